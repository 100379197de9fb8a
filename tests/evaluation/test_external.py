"""A bundle judged on images from elsewhere, as a user does it, and what users get wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from trained import THRESHOLD

from lungct_tune.data import make_phantoms, read_images
from lungct_tune.data.seen_images import ALIKE, NEW, SAME_FILE, LearnedImages, list_learned
from lungct_tune.evaluate import main
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.evaluation.inference import load_model
from lungct_tune.experiment.bundle import CHECKSUMS, CONFIG, LEARNED, METRICS, BundleError, write_bundle
from lungct_tune.experiment.folder import Experiment

CANCERS = ("adenocarcinoma", "large.cell.carcinoma", "squamous.cell.carcinoma")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other phantom patients, in folders of the four classes."""
    there = make_phantoms(tmp_path_factory.mktemp("elsewhere"), seed=7, patients=20, size=48)
    folder = tmp_path_factory.mktemp("data") / "hospital"
    for name in (*CANCERS, "normal"):
        (folder / name).mkdir(parents=True)
        for image in there.glob(f"*/{name}*/*.png"):
            shutil.copy(image, folder / name)
    return folder


@pytest.fixture
def coarse(tmp_path: Path, elsewhere: Path) -> Path:
    """The same, as a set that knows malignant, benign and normal only."""
    folder = tmp_path / "coarse"
    shutil.copytree(elsewhere / "normal", folder / "Normal cases")
    shutil.copytree(elsewhere / CANCERS[0], folder / "Malignant cases")
    shutil.copytree(elsewhere / CANCERS[1], folder / "Malignant cases", dirs_exist_ok=True)
    shutil.copytree(elsewhere / CANCERS[2], folder / "Bengin cases")
    return folder


def judged(out: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    return json.loads((out / METRICS).read_text()), pd.read_csv(out / "predictions.csv")


def right_N(predictions: pd.DataFrame) -> pd.Series:
    return predictions["class"] == predictions["predicted"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in this process, with what it says: a process of its own would import torch for 5 s."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, said.getvalue(), complained.getvalue())


def test_a_coarser_set_is_judged_as_cancer_against_normal(bundle: Path, coarse: Path, tmp_path: Path) -> None:
    classes = "Malignant cases=cancer,Bengin cases=other,Normal cases=normal"
    ended = run(bundle, "--data", coarse, "--map", classes, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "evaluated: cancer 20, normal 10" in ended.stdout
    assert "left out, mapped to other: 10 images" in ended.stdout
    assert f"cancer against normal (cancer if its probability is above {THRESHOLD:.3f}): sens" in ended.stdout
    metrics, predictions = judged(tmp_path / "out")
    two = metrics["test"]["cancer_vs_normal"]
    assert metrics["left_out"]["other"] == 10 and metrics["test"]["n"] == len(predictions) == 30
    assert np.sum(two["table"]) == 30 and two["n_cancer"] == 20
    images = read_images(coarse, 32, class_map={"Malignant cases": "m", "Normal cases": "n", "Bengin cases": "b"})
    rows = images.table.set_index("path").index.get_indexer(predictions["path"])
    four_NC = Classifier.load(bundle).classify(images.images_NHW[rows]).probabilities_NC
    np.testing.assert_allclose(predictions["p_cancer"], four_NC[:, [0, 1, 3]].sum(axis=1))
    right = (predictions["p_cancer"] > 0.5) == predictions["path"].str.startswith("Malignant")
    assert metrics["test"]["accuracy"]["value"] == pytest.approx(right.mean())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tell cancer and normal apart" in page and "10 images were left out: they are mapped to other" in page
    assert "own classes are finer than these" in page and "Grad-CAM" not in page
    assert page.count('class="path"') == page.count("data:image/webp")  # a picture a case, and no map


def test_the_four_classes_are_judged_with_calibrated_probabilities(
    bundle: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    out = tmp_path / "out"
    assert main([str(bundle), "--data", str(elsewhere), "--out", str(out)]) == 0
    metrics, predictions = judged(out)
    model, config = load_model(bundle)
    images = read_images(elsewhere, 32, progress=False)
    rows = images.table.set_index("path").index.get_indexer(predictions["path"])
    with torch.no_grad():
        grey_N3HW = torch.tensor(images.images_NHW[rows] / 255, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
        plain_NC = model(grey_N3HW).softmax(dim=1).numpy()
    columns = [f"p_{name.replace(' ', '_')}" for name in config.classes]
    np.testing.assert_allclose(predictions[columns], calibrated(plain_NC, 1.5), atol=1e-4)
    scaling, brier = metrics["test"]["calibration"], ((plain_NC - np.eye(4)[images.table["label"].iloc[rows]]) ** 2)
    page = (out / "report.html").read_text()
    assert f"{(~right_N(predictions)).sum()} of 40 images are misclassified" in page and "Grad-CAM" in page
    assert "How well does the model of one tell adenocarcinoma" in page
    assert scaling["temperature"] == 1.5
    assert scaling["before"]["brier"]["value"] == pytest.approx(brier.sum(axis=1).mean(), abs=1e-4)
    assert metrics["learned_from"] == {SAME_FILE: 0, ALIKE: 0}
    assert metrics["test"]["leak_free"] is None and "trained on" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [CANCERS[0], "normal"])
def test_images_of_one_class_show_its_sensitivity_and_what_needs_two_is_not_defined(
    bundle: Path, elsewhere: Path, tmp_path: Path, name: str
) -> None:
    data = tmp_path / "one"
    shutil.copytree(elsewhere / name, data / name)
    ended = run(bundle, "--data", data, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "the figures say nothing about these classes" in ended.stdout and "always" not in ended.stdout
    metrics, predictions = judged(tmp_path / "out")
    of_class, cancer = metrics["test"]["per_class"][name], metrics["test"]["cancer_vs_normal"]
    assert of_class["sensitivity"]["value"] == pytest.approx(right_N(predictions).mean())
    assert of_class["sensitivity"]["ci95"] and metrics["test"]["references"] == {}
    undefined = ("specificity", "ppv", "npv", "auroc", "average_precision")
    assert [of_class[figure]["value"] for figure in undefined] == [None] * 5
    known = {rate for rate in ("sensitivity", "specificity") if cancer[rate]["value"] is not None}
    assert known == {"specificity" if name == "normal" else "sensitivity"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The images are of one class." in page and "decision curve" not in page and "For comparison" not in page


def test_images_that_it_has_learned_from_are_told(
    bundle: Path, elsewhere: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(elsewhere, data)
    same, saved_again = sorted((phantoms / "train").glob("normal/*.png"))[::6][:2]
    shutil.copy(same, data / "normal" / "same.png")
    with Image.open(saved_again) as image:
        changed = ImageOps.invert(image.convert("L")).transpose(Image.Transpose.ROTATE_90)
    changed.resize((80, 80)).save(data / "normal" / "again.jpg", quality=60)
    assert main([str(bundle), "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "trained on 1 of these files, and on images that look like 1 of the others" in said
    metrics, _ = judged(tmp_path / "out")
    balanced = metrics["test"]["leak_free"]["balanced_accuracy"]["value"]
    assert "on the 40 images without group overlap: accuracy" in said and f"balanced accuracy {balanced:.3f}" in said
    page = (tmp_path / "out" / "report.html").read_text()
    accuracy = f"{100 * metrics['test']['leak_free']['accuracy']['value']:.1f}"
    assert f"On the 40 images of groups that the model was not trained on: accuracy {accuracy}" in page
    tiles = re.findall(r"</strong><span>([^<]+)", page)
    assert tiles[0] == "balanced accuracy, 40 images without group overlap"
    assert tiles[2] == "balanced accuracy, all 42 images"
    assert metrics["learned_from"] == {SAME_FILE: 1, ALIKE: 1}
    assert metrics["test"]["leak_free"]["n"] == metrics["test"]["n"] - 2


def test_other_slices_of_a_patient_that_it_was_trained_on_are_not_new(
    bundle: Path, elsewhere: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(elsewhere, data)
    shutil.copy(min((phantoms / "train").glob("normal/*.png")), data / "normal" / "same.png")
    other = min((elsewhere / "normal").iterdir()).name
    (data / "groups.csv").write_text(f"path,group\nnormal/same.png,ann\nnormal/{other},ann\n")
    assert main([str(bundle), "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    assert "the model was trained on 1 of these files: the accuracy is too high" in capsys.readouterr().out
    metrics, predictions = judged(tmp_path / "out")
    group = predictions.set_index("path")["group"]
    is_new_N = (predictions["group"] != group["normal/same.png"]).to_numpy()
    assert group[f"normal/{other}"] == group["normal/same.png"] and metrics["learned_from"] == {SAME_FILE: 1, ALIKE: 0}
    assert metrics["test"]["leak_free"]["n"] == is_new_N.sum() < 40
    assert metrics["test"]["leak_free"]["accuracy"]["value"] == pytest.approx(right_N(predictions)[is_new_N].mean())
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"on images of the groups of the {(~is_new_N).sum()} others, or on images that look like them" in page


def test_a_page_says_when_the_model_was_trained_on_phantoms(bundle: Path, elsewhere: Path, tmp_path: Path) -> None:
    assert main([str(bundle), "--data", str(elsewhere), "--out", str(tmp_path / "real")]) == 0
    assert "PHANTOMS" not in (tmp_path / "real" / "report.html").read_text(), "its settings name a folder of images"
    files = {file.name: file.read_bytes() for file in bundle.iterdir() if file.name != CHECKSUMS}
    config = json.loads(files[CONFIG])
    config["settings"]["data"] = None
    experiment = Experiment.at(str(tmp_path), "drawn")
    write_bundle(experiment, files | {CONFIG: json.dumps(config).encode()})
    drawn = Path(experiment.uri, "best")
    assert main([str(drawn), "--data", str(elsewhere), "--out", str(tmp_path / "out")]) == 0
    assert "trained on PHANTOMS, drawn by a program" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_only_copies_and_neighbours_are_like_what_was_learned_from(tmp_path: Path, seed: int) -> None:
    images = read_images(make_phantoms(tmp_path, seed=seed, patients=40, size=48), 48, progress=False)
    groups_N = images.table["group"].to_numpy()
    learned = np.flatnonzero(groups_N % 2 == 0)[::2]  # of every second patient some slices
    seen_N = LearnedImages(list_learned(images, learned)).seen(images.images_NHW, images.table["digest"])
    assert set(seen_N[learned]) == {SAME_FILE}
    assert set(seen_N[groups_N % 2 == 1]) == {NEW}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--map", "normal=malignant"], "normal=malignant: this bundle's images can be adenocarcinoma, large cell"),
        (["--map", "normal"], "expected FOLDER=CLASS[,FOLDER=CLASS...]"),
        (["--map", ",".join(f"{name}=other" for name in (*CANCERS, "normal"))], "mapped to other, so none is left"),
        (["--map", "Normals=other"], "is called 'Normals' (did you mean normal?); there are adenocarcinoma, "),
        (["--data", "UNKNOWN"], "the classes of these folders"),
        (["--data", "EMPTY"], "found no images"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--out", "."], "is there already; choose another --out"),
        (["--out", "BUNDLE/judged/again"], "is a bundle, whose checksums are final; choose another --out"),
        (["--out", "/proc/judged"], "/proc/judged cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    arguments: list[str], says: str, bundle: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(elsewhere, tmp_path / "UNKNOWN")
    (tmp_path / "UNKNOWN" / "normal").rename(tmp_path / "UNKNOWN" / "healthy")
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / word) if word in ("UNKNOWN", "EMPTY") else word for word in arguments]
    arguments = [word.replace("BUNDLE", str(bundle)) for word in arguments]
    assert main([str(bundle), "--data", str(elsewhere), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_was_tampered_with_judges_nothing(
    bundle: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / LEARNED).write_text("sha256,thumbnail\n")
    assert main([str(tmp_path / "bundle"), "--data", str(elsewhere), "--out", str(tmp_path / "out")]) == 2
    assert f"{LEARNED}: not the file that was written" in capsys.readouterr().err
    assert main([str(tmp_path), "--data", str(elsewhere), "--out", str(tmp_path / "out")]) == 2
    assert "this is no complete bundle" in capsys.readouterr().err


def test_figures_that_are_there_are_not_written_over(
    bundle: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(bundle), "--data", str(elsewhere)]) == 0
    before = (tmp_path / "hospital-judged" / METRICS).read_bytes()
    assert main([str(bundle), "--data", str(elsewhere)]) == 2
    assert "hospital-judged is there already" in capsys.readouterr().err
    assert (tmp_path / "hospital-judged" / METRICS).read_bytes() == before


def test_who_stops_it_while_it_writes_finds_nothing_and_may_run_it_again(
    bundle: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, command = Path.write_bytes, (bundle, "--data", elsewhere, "--out", tmp_path / "new" / "out")

    def stopped_at_the_second_file(path: Path, content: bytes) -> int:
        if path.name == METRICS:
            raise KeyboardInterrupt
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", stopped_at_the_second_file)
        ended = run(*command)
    assert ended.returncode == 130 and "Nothing was written" in ended.stderr
    assert not list((tmp_path / "new").iterdir())
    assert run(*command).returncode == 0


def test_a_class_of_the_model_that_is_called_other_is_evaluated(bundle: Path, elsewhere: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != CHECKSUMS}
    other = files[CONFIG].replace(b'"squamous cell carcinoma"', b'"other"')
    write_bundle(Experiment.at(str(tmp_path), "other"), files | {CONFIG: other})
    ended = run(
        *(tmp_path / "other" / "best", "--data", elsewhere, "--out", tmp_path / "out"),
        *("--map", "squamous.cell.carcinoma=other"),
    )
    assert ended.returncode == 0 and "other 10" in ended.stdout, ended
    assert "left out" not in ended.stdout


def test_a_folder_that_is_called_by_a_dot_has_its_name(
    bundle: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, dots in ((elsewhere, "."), (elsewhere / "normal", "..")):
        monkeypatch.chdir(folder)
        out = tmp_path / f"out{dots}"
        assert main([str(bundle), "--data", dots, "--out", str(out)]) == 0
        assert "<title>Evaluation of the model of one on hospital</title>" in (out / "report.html").read_text()


def test_a_class_that_the_bundle_does_not_know_is_named(
    bundle: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "checksums.txt"}
    other = files[CONFIG].replace(b'"squamous cell carcinoma"', b'"something else"')
    write_bundle(Experiment.at(str(tmp_path), "other"), files | {CONFIG: other})
    known = [str(tmp_path / "other" / "best"), "--data", str(elsewhere), "--out", str(tmp_path / "out")]
    assert main(known) == 2
    assert "has images of squamous cell carcinoma, and the bundle knows adeno" in capsys.readouterr().err
    assert main([*known, "--map", "normal=cancer"]) == 2  # what is neither cancer nor normal would be neither
    assert "this bundle's images can be adenocarcinoma" in capsys.readouterr().err
    assert main([*known, "--map", "squamous.cell.carcinoma=other"]) == 0


def test_a_model_out_of_bounds_is_not_built(bundle: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "checksums.txt"}
    huge = re.sub(rb'"image_size": \d+', b'"image_size": 1000000', files[CONFIG])
    other = files[CONFIG].replace(b'"truncation_depth": 4', b'"truncation_depth": 5')
    for name, content, fault in (("huge", huge, "image_size"), ("other", other, "does not have the weights")):
        write_bundle(Experiment.at(str(tmp_path), name), files | {CONFIG: content})
        with pytest.raises(BundleError, match=fault):
            load_model(tmp_path / name / "best")
