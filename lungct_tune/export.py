"""Writes a bundle's model as one file for ONNX Runtime or PyTorch, which needs nothing of this package.

python -m lungct_tune.export --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.errors import UserError
from lungct_tune.stopping import stop_says

EXAMPLES = """\
examples:
  python -m lungct_tune.export results/NAME/best --to onnx
  python -m lungct_tune.export results/NAME/best --to torch --out lung.pt2 --data chest-ctscan

The graph takes grey images, uint8 (N, H, W), and gives calibrated probabilities: normalisation and temperature are in
it. It is compared with the bundle before it is written: on the test images if --data names their folder (images
of phantoms are drawn again), else on random images. The comparison is written beside it, as FILE.json.
"""

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("export", EXAMPLES)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="its folder, results/NAME/best or as pulled")
    parser.add_argument("--to", choices=SUFFIXES, required=True, help="ONNX Runtime, or PyTorch's torch.export")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the file to write (./NAME.onnx or ./NAME.pt2)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the folder of the search's images")
    asked = parser.parse_args(argv)
    return exit_status(lambda: export(asked, terminal()), "Nothing was written.")


def export(asked: argparse.Namespace, console: Console) -> None:
    """Exports the model, compares the graph with the bundle, and writes both.

    Raises:
        BundleError: the bundle is incomplete or altered.
        UserError: a package or a test image is missing, the graph does not give the bundle's probabilities, or the
            output cannot be written.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.bundle import as_json, verify

    verify(asked.bundle)  # before torch is imported, which takes seconds

    from lungct_tune.data import make_phantoms
    from lungct_tune.data.cache import default_cache
    from lungct_tune.evaluation import exported
    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.reporting.output_file import check_output, written_whole

    classifier = Classifier.load(asked.bundle, device="cpu")
    settings = classifier.config.settings
    out = asked.out or Path(f"{settings.name}{SUFFIXES[asked.to]}")
    beside = out.with_name(f"{out.name}.json")
    for file in (out, beside):
        check_output(file, "--out")
    data = asked.data
    if data is None and settings.data is None:
        data = make_phantoms(default_cache(), settings.seed)
    images_NHW, what = exported.images_to_compare(classifier, data)

    graph = exported.export_onnx(classifier) if asked.to == "onnx" else exported.export_torch(classifier)
    compared = exported.compare_with_bundle(graph, classifier, images_NHW, what)
    if not compared["same"]:
        raise UserError(
            f"the graph does not give the bundle's probabilities: on {what} they differ by up to "
            f"{compared['largest_difference']:.2g}, and {compared['changed_classes']} classes change. Please report it "
            "with the versions of torch, onnx and onnxruntime"
        )
    with written_whole(out, "--out") as new, written_whole(beside, "--out") as new_beside:
        new.write_bytes(graph.content)
        new_beside.write_bytes(as_json({"file": out.name, "about": exported.about(classifier), "compared": compared}))
    done = (
        f"{out}: {len(graph.content) / 1e6:.1f} MB; on {what} its probabilities differ from the bundle's by at most "
        f"{compared['largest_difference']:.1g}, and no class changes"
    )
    with stop_says(done):
        console.print(done)


if __name__ == "__main__":
    sys.exit(main())
