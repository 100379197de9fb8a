"""Images classified with a bundle, as a user does it: files of any kind, by image and by patient, with warnings."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import skimage
import sklearn
from dicom_files import write_slice
from PIL import Image, ImageDraw
from processes import run_here
from scipy.special import softmax
from trained import THRESHOLD, write_trained_bundle

from lungct_tune.data import make_phantoms, read_images
from lungct_tune.data.inputs import find_inputs, read_input
from lungct_tune.data.seen_images import NEW, SAME_FILE
from lungct_tune.evaluation.classifier import Classifier, ClassifyError
from lungct_tune.experiment.bundle import FEATURES, write_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.predict import main
from lungct_tune.reporting.heat_maps import HeatMapFolder

run = partial(run_here, main)

P = ["p_adenocarcinoma", "p_large_cell_carcinoma", "p_normal", "p_squamous_cell_carcinoma"]
CANCERS = [P[0], P[1], P[3]]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough phantom patients for the distribution of a model's features: 90, with 180 images."""
    return make_phantoms(tmp_path_factory.mktemp("data"), seed=1, patients=90, size=48)


@pytest.fixture(scope="module")
def bundle(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_bundle(tmp_path_factory.mktemp("results"), phantoms)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of 12 other phantom patients, without classes."""
    drawn = make_phantoms(tmp_path_factory.mktemp("drawn"), seed=9, patients=12, size=48)
    groups = pd.read_csv(drawn / "groups.csv")
    folder = tmp_path_factory.mktemp("images") / "ward"
    for path, group in zip(groups["path"], groups["group"], strict=True):
        (folder / group).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / path, folder / group / path.replace("/", "_"))
    return folder


@pytest.fixture(scope="module")
def rows(bundle: Path, patients: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("out") / "rows.csv"
    status, said, complained = run(bundle, patients, "--out", out)
    assert status == 0, complained
    assert "classified: 24 images" in said and f"written: {out}" in said
    return pd.read_csv(out, keep_default_na=False)


def test_each_image_gets_a_row_with_the_answers_of_the_bundles_model(
    bundle: Path, patients: Path, rows: pd.DataFrame
) -> None:
    assert sorted(rows["path"]) == sorted(map(str, patients.glob("*/*.png")))
    classifier = Classifier.load(bundle)
    assert repr(classifier) == f"Classifier(folder={bundle!r}, device=None)", "a notebook shows it, without the weights"
    images_NHW = np.array([np.asarray(Image.open(path).convert("L").resize((32, 32), 2)) for path in rows["path"]])
    classified = classifier.classify(images_NHW)
    np.testing.assert_allclose(rows[P], classified.probabilities_NC, atol=1e-6)
    names = np.array(["adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma"])
    assert (rows["class"] == names[rows[P].to_numpy().argmax(axis=1)]).all()
    assert ((rows["cancer_or_normal"] == "cancer") == (rows[CANCERS].sum(axis=1) > THRESHOLD)).all()
    assert set(rows["learned_from"]) == {NEW} and set(rows["unreadable"]) == {""}


def test_training_images_are_told_and_held_out_slices_are_not_unlike(
    bundle: Path, phantoms: Path, rows: pd.DataFrame
) -> None:
    assert rows["unlike_training"].mean() <= 0.06, "held-out slices"
    learned = sorted((phantoms / "train").glob("*/*.png"))[:5]
    again = Classifier.load(bundle).classify_files(learned)
    assert set(again["learned_from"]) == {SAME_FILE} and not again["unlike_training"].any()


def test_what_is_no_ct_slice_is_unlike_training(bundle: Path, tmp_path: Path) -> None:
    photographs = [
        *Path(skimage.__file__).parent.glob("data/*.[pj]*g"),
        *Path(sklearn.__file__).parent.glob("datasets/images/*.jpg"),
        Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg"),
    ]
    page = Image.new("L", (300, 400), 255)
    for line in range(20):
        ImageDraw.Draw(page).text((20, 18 * line), "Findings: none. Impression: normal chest.", fill=0)
    page.save(tmp_path / "page.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "noise.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    others = [*photographs, *sorted(tmp_path.glob("*.png"))]
    assert len(others) > 25
    table = Classifier.load(bundle).classify_files(others)
    unlike = int(table["unlike_training"].sum())
    assert unlike >= len(others) - 1, table[["path", "distance"]].sort_values("distance").head().to_string()
    status, said, _ = run(bundle, *others)
    assert status == 0 and f"unlike all that the model has learned from (distance above 1): {unlike}." in said


def test_an_array_of_another_size_is_refused(bundle: Path) -> None:
    classifier = Classifier.load(bundle)
    wrong_ones = (np.zeros((1, 48, 48), np.uint8), np.zeros((32, 32), np.uint8), np.zeros((1, 32, 32)), [])
    for wrong in wrong_ones:
        with pytest.raises(ClassifyError, match=r"uint8 arrays \(N, 32, 32\)"):
            classifier.classify(wrong)  # type: ignore[arg-type]
    with pytest.raises(ClassifyError, match="1 digests for 2 images"):
        classifier.classify(np.zeros((2, 32, 32), np.uint8), [""])
    with pytest.raises(ClassifyError, match=r"a list of files: \['slice.png'\]"):
        classifier.classify_files("slice.png")
    assert classifier.classify(np.zeros((0, 32, 32), np.uint8)).probabilities_NC.shape == (0, 4)


def test_the_reason_is_not_cut_by_a_file_whose_name_is_a_word_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_text("none")
    monkeypatch.chdir(tmp_path)
    assert read_input("image", 32, None) == read_input(str(tmp_path / "image"), 32, None)
    assert "not an image in one of the formats" in str(read_input("image", 32, None))


def test_unreadable_files_are_named_and_give_status_1(bundle: Path, patients: Path, tmp_path: Path) -> None:
    good = next(patients.glob("*/*.png"))
    (tmp_path / "in").mkdir()
    shutil.copy(good, tmp_path / "in" / "b.png")
    (tmp_path / "in" / "a.png").write_bytes(good.read_bytes()[:300])
    (tmp_path / "in" / "notes.txt").write_text("not an image, and not taken for one")
    status, said, _ = run(bundle, tmp_path / "in", "--heatmaps", tmp_path / "maps")
    assert status == 1
    assert "classified: 1 image (" in said and "unreadable: 1 file" in said and "a.png: " in said
    assert "left aside: 1 text, tables" in said
    assert [file.name for file in (tmp_path / "maps").iterdir()] == ["b.png.heatmap.png"]


READERS = {
    ".csv": lambda out: pd.read_csv(out, keep_default_na=False, na_values={"class": ""}),
    ".json": lambda out: pd.DataFrame(json.loads(out.read_text())),
    ".parquet": pd.read_parquet,
}


@pytest.mark.parametrize("ending", READERS)
@pytest.mark.parametrize("by", ["image", "patient"])
@pytest.mark.parametrize("readable", [0, 1])
def test_unreadable_files_are_rows_too(
    bundle: Path, patients: Path, tmp_path: Path, ending: str, by: str, readable: int
) -> None:
    """Each file is of a patient of its own."""
    good, out = next(patients.glob("*/*.png")), tmp_path / f"out{ending}"
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(good.read_bytes()[:300])
    if readable:
        shutil.copy(good, tmp_path / "in" / "b" / "1.png")
    status, said, complained = run(bundle, tmp_path / "in", "--by", by, "--out", out)
    assert status == 1 and f"written: {out}" in said, complained
    table = READERS[ending](out)
    assert list(table["class"].notna()) == [False, bool(readable)]
    assert [str(why) not in ("", "0") for why in table["unreadable"]] == [True, not readable]


def test_images_and_patients_are_printed_with_their_whole_names_the_likeliest_class_first(
    bundle: Path, patients: Path, rows: pd.DataFrame
) -> None:
    """In a table of ten columns a terminal of 80 broke paths every five characters."""
    first = rows.iloc[0]
    _, said, _ = run(bundle, Path(first["path"]).parent)
    lines = said.splitlines()
    line = lines[lines.index(first["path"]) + 1]
    printed = {name: float(value) for name, _, value in (part.rpartition(" ") for part in line.strip().split(", "))}
    assert next(iter(printed)) == first["class"] and list(printed.values()) == sorted(printed.values(), reverse=True)
    assert sorted(printed.values()) == pytest.approx(sorted(first[P].astype(float)), abs=6e-4)
    _, said, _ = run(bundle, patients, "--by", "patient")
    assert set(map(str, patients.iterdir())) <= set(said.splitlines())


def test_a_patients_probabilities_are_those_of_the_mean_logits(
    bundle: Path, patients: Path, rows: pd.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "patients.parquet"
    status, said, complained = run(bundle, patients, "--by", "patient", "--out", out)
    assert status == 0, complained
    assert "classified: 12 patients" in said and "mean logits" in said
    table = pd.read_parquet(out)
    assert list(table["images"]) == [2] * 12 and set(table["patient"]) == set(map(str, patients.iterdir()))
    for _, patient in table.iterrows():
        own = rows[rows["path"].str.startswith(patient["patient"] + "/")]
        joined_C = softmax(np.log(own[P].to_numpy()).mean(axis=0))
        np.testing.assert_allclose(patient[P].to_numpy(dtype=float), joined_C, atol=1e-9)
        says = dict(part.rsplit(" ", 1) for part in patient["images_say"].split(", "))
        assert {name: int(n) for name, n in says.items()} == own["class"].value_counts().to_dict()
        assert (patient["cancer_or_normal"] == "cancer") == (joined_C[[0, 1, 3]].sum() > THRESHOLD)


def test_patients_are_those_of_groups_csv_where_there_is_one(phantoms: Path, patients: Path) -> None:
    groups = pd.read_csv(phantoms / "groups.csv").set_index("path")["group"]
    found = find_inputs([str(phantoms)]).images
    assert {image.group for image in found} == set(groups)
    assert all(groups[str(Path(image.source).relative_to(phantoms))] == image.group for image in found)
    one = next(patients.glob("*/*.png"))
    named_twice = find_inputs([str(one), f"{one.parent}/*.png"]).images
    assert len(named_twice) == 2 and {image.group for image in named_twice} == {str(one.parent)}


def test_a_file_that_is_named_twice_counts_once_with_its_listed_group(phantoms: Path, tmp_path: Path) -> None:
    """Found: a file named before its folder lost its patient, and a folder named twice counted its documents twice."""
    folder = Path(shutil.copytree(phantoms, tmp_path / "a b"))
    (folder / "notes.txt").write_text("")
    one, again = str(next(folder.rglob("*.png"))), folder.as_uri()
    assert "%20" in again
    expected, twice = find_inputs([str(folder)]), find_inputs([one, again, str(folder)])
    assert sorted(twice.images) == sorted(expected.images) and twice.left_aside == expected.left_aside
    assert find_inputs([str(folder / "notes.txt"), again]).left_aside.total() == expected.left_aside.total() - 1


@pytest.mark.parametrize("inputs", [["a", "b", "c"], ["."]])
def test_patients_of_one_name_in_two_groups_csv_are_two(
    bundle: Path, patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str]
) -> None:
    """Hospitals number their patients alike. The third has no list: there the folder "c" is the patient."""
    monkeypatch.chdir(tmp_path)
    files = sorted(patients.glob("*/*.png"))
    for number, (hospital, names) in enumerate({"a": ["1", "c"], "b": ["1", "2"], "c": []}.items()):
        Path(hospital).mkdir()
        for i in range(2):
            shutil.copy(files[2 * number + i], f"{hospital}/{i}.png")
        if names:
            lines = [f"{i}.png,{name}" for i, name in enumerate(names)]
            Path(hospital, "groups.csv").write_text("\n".join(["path,group", *lines]))
    status, _, complained = run(bundle, *inputs, "--by", "patient", "--out", "out.csv")
    assert status == 0, complained
    images = dict(pd.read_csv("out.csv", dtype={"patient": str}).set_index("patient")["images"])
    assert images == {"1 (a)": 1, "c (a)": 1, "1 (b)": 1, "2": 1, "c": 2}


def test_images_at_a_uri_are_those_of_the_folder(bundle: Path, patients: Path, s3: object) -> None:
    import pyarrow.fs

    folder = next(patients.iterdir())
    uri = f"s3://bucket/{folder.name}"
    filesystem, place = pyarrow.fs.FileSystem.from_uri(uri)
    pyarrow.fs.copy_files(str(folder), place, destination_filesystem=filesystem)
    odd = "Großzellig 100%20 sicher? #1"
    pyarrow.fs.copy_files(str(folder), f"{place}/{odd}", destination_filesystem=filesystem)
    found = find_inputs([uri]).images
    assert len(found) == 2 * len(list(folder.iterdir()))
    assert [Path(image.source).name for image in found[-2:]] == sorted(file.name for file in folder.iterdir())
    classifier = Classifier.load(bundle)
    there = classifier.classify_files([image.source for image in found])
    here = classifier.classify_files(2 * sorted(folder.iterdir()))
    pd.testing.assert_frame_equal(there.drop(columns="path"), here.drop(columns="path"))
    (again,) = find_inputs([found[0].source]).images
    assert "Gro%C3%9Fzellig%20100%2520" in again.source
    assert classifier.classify_files([again.source])["unreadable"].tolist() == [""]


def test_inputs_without_one_readable_image_end_in_a_sentence(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/\xff.png")).write_bytes(b"x")
    status, said, _ = run(bundle, tmp_path / "in", "--heatmaps", tmp_path / "maps")
    assert status == 1 and "not UTF-8" in said
    assert "written" not in said and not (tmp_path / "maps").exists()
    (tmp_path / "reports").mkdir()
    write_slice(tmp_path / "reports" / "one", np.zeros((32, 32), np.uint8), ImageType=["DERIVED", "LOCALIZER"])
    status, _, complained = run(bundle, tmp_path / "reports")
    assert status == 2 and "there are no images; left aside: 1 DICOM localisers" in complained


def test_heat_maps_have_one_scale(bundle: Path, patients: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(bundle)
    assert classifier.features is not None
    files = sorted(patients.glob("*/*.png"))[:8]
    images_NHW = np.array([np.asarray(Image.open(path).convert("L").resize((32, 32), 2)) for path in files])
    classes_N = classifier.classify(images_NHW).predicted_N
    maps_Nhw = classifier.heat_maps(images_NHW, classes_N)
    alone_Nhw = np.concatenate([classifier.heat_maps(images_NHW[i : i + 1], classes_N[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(maps_Nhw, alone_Nhw, atol=1e-5)
    assert maps_Nhw.max() <= 1 and len({round(float(one.max()), 6) for one in maps_Nhw}) > 1
    assert run(bundle, *files, "--heatmaps", tmp_path / "maps")[0] == 0
    drawn = sorted((tmp_path / "maps").rglob("*.png"))
    assert [file.name for file in drawn] == sorted(f"{file.name}.heatmap.png" for file in files)
    red = [
        np.asarray(Image.open(file), dtype=int)[..., 0] - np.asarray(Image.open(file), dtype=int)[..., 1]
        for file in drawn
    ]
    assert np.corrcoef([one.mean() for one in red], [one.mean() for one in maps_Nhw])[0, 1] > 0.9


def test_who_stops_it_is_told_of_the_heat_maps_that_are_there(
    bundle: Path, patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, maps = HeatMapFolder.__call__, tmp_path / "maps"

    def stopped_after_some(folder: HeatMapFolder, rows: pd.DataFrame, images_NHW: np.ndarray) -> None:
        draw(folder, rows, images_NHW)
        raise KeyboardInterrupt

    monkeypatch.setattr(HeatMapFolder, "__call__", stopped_after_some)
    status, _, complained = run(bundle, patients, "--heatmaps", maps)
    assert status == 130 and list(maps.rglob("*.png"))
    assert f"written, to {maps}; remove them" in complained and "Nothing was written" not in complained


def test_who_stops_it_while_it_prints_is_told_of_the_file_that_is_there(
    bundle: Path, patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*printed: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lungct_tune.reporting.prediction.print_predictions", stop)
    out = tmp_path / "rows.csv"
    image = next(patients.rglob("*.png"))
    assert main([str(bundle), str(image), "--out", str(out)]) == 130
    assert out.exists() and f"stopped. written: {out}" in capsys.readouterr().err
    assert main([str(bundle), str(image)]) == 130
    assert "stopped. Nothing was written." in capsys.readouterr().err


def test_a_bundle_without_features_says_so(bundle: Path, patients: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name not in (FEATURES, "checksums.txt")}
    write_bundle(Experiment.at(str(tmp_path), "older"), files)
    older, image = tmp_path / "older" / "best", next(patients.glob("*/*.png"))
    status, said, _ = run(older, image)
    assert status == 0 and "unlike images are not recognised" in said
    status, _, complained = run(older, image, "--heatmaps", tmp_path / "maps")
    assert status == 2 and f"has no {FEATURES}" in complained


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.png"], "nowhere.png: there is no such file or folder"),
        (["EMPTY"], "there are no images in this folder"),
        (["IMAGE", "--out", "rows.xlsx"], "must end in one of .csv, .json, .parquet"),
        (["IMAGE", "--out", "nowhere/rows.csv"], "there is no folder nowhere"),
        (["IMAGE", "--out", "BUNDLE/rows.csv"], "is a bundle, whose checksums are final"),
        (["IMAGE", "--heatmaps", "FULL"], "is no empty folder; choose another --heatmaps"),
        (["IMAGE", "--heatmaps", "maps", "--address", "auto"], "leave --address out"),
        (["s3://user:secret@bucket/x"], "the s3:// URI contains credentials"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], says: str, bundle: Path, patients: Path, tmp_path: Path
) -> None:
    image = next(patients.glob("*/*.png"))
    (tmp_path / "EMPTY").mkdir()
    places = {"EMPTY": tmp_path / "EMPTY", "IMAGE": image, "FULL": image.parent}
    words = [str(places.get(word, word)).replace("BUNDLE", str(bundle)) for word in arguments]
    status, _, complained = run(bundle, *words)
    assert status == 2 and says in complained and "secret" not in complained


def test_images_are_read_once_for_evaluate_and_predict_alike(bundle: Path, phantoms: Path) -> None:
    images = read_images(phantoms, 32, progress=False)
    classifier = Classifier.load(bundle)
    of_set = classifier.classify(images.images_NHW, images.table["digest"].to_numpy())
    of_files = classifier.classify_files([str(phantoms / path) for path in images.table["path"]])
    np.testing.assert_array_equal(of_files[P].to_numpy(), of_set.probabilities_NC)
    assert of_set.seen_N is not None and list(of_files["learned_from"]) == list(of_set.seen_N)


def test_a_cluster_gives_the_rows_that_this_machine_gives(finished: Path, patients: Path, tmp_path: Path) -> None:
    """On a bundle that a search has made, with a file that cannot be read."""
    bundle = finished / "best"
    folder = tmp_path / "in"
    shutil.copytree(patients, folder)
    (folder / "broken.png").write_bytes(b"no image")
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    assert run(bundle, folder, "--out", here, "--heatmaps", tmp_path / "maps")[0] == 1
    assert run(bundle, folder, "--out", there, "--address", os.environ["RAY_ADDRESS"])[0] == 1
    local, remote = pd.read_parquet(here), pd.read_parquet(there)
    numbers = [*P, "distance"]
    np.testing.assert_allclose(remote[numbers].astype(float), local[numbers].astype(float), atol=1e-5)
    pd.testing.assert_frame_equal(remote.drop(columns=numbers), local.drop(columns=numbers), check_dtype=False)
    config = json.loads((bundle / "config.json").read_text())
    validation = (pd.read_csv(finished / "split.csv")["split"] == "valid").sum()
    assert config["operating_point"]["chosen_on"]["images"] == validation
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["test"]["cancer_vs_normal"]["threshold"] == config["operating_point"]["threshold"]
    high = metrics["test"]["cancer_vs_normal"]["at_95_specificity"]
    assert high["threshold"] == config["operating_point"]["at_95_specificity"]
    assert {"sensitivity", "specificity"} < high.keys()
    assert local["unlike_training"].dropna().mean() <= 0.1
