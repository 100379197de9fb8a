"""The only package that imports Ray: slots, searcher, scheduler, resources, final retraining."""
