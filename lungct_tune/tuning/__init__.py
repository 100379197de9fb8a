"""The only room that knows Ray: slots, the searcher, the scheduler, resources, the final retraining."""
