"""Settings: the command line and a YAML file are two doors to one validated model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lungct_tune.config.settings import Settings, SettingsError, flags, read_settings, validate


def test_every_field_is_a_flag_and_help_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = capsys.readouterr().out
    for field in Settings.model_fields:
        assert f"--{field.replace('_', '-')}" in text
    assert len(text.splitlines()) <= 60
    assert text.rstrip().splitlines()[-4].startswith("examples")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trials: 7\nimage-size: 96\nclass_map: {benign: benign, malignant: cancer}\n")
    settings, given = read_settings(["--settings", str(file), "--trials", "9"])
    assert (settings.trials, settings.image_size) == (9, 96)
    assert settings.class_map == {"benign": "benign", "malignant": "cancer"}
    assert given == {"trials", "image_size", "class_map"}


def test_a_field_that_the_file_has_in_both_spellings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trials: 7\nimage-size: 96\nimage_size: 64\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml: image-size is there twice, with - and with _"):
        read_settings(["--settings", str(file)])


def test_class_map_from_the_command_line() -> None:
    settings, _ = read_settings(["--class-map", "Benign cases=benign, tumour=cancer"])
    assert settings.class_map == {"Benign cases": "benign", "tumour": "cancer"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], ["trials", "'0'", "the least is 1"]),
        (["--image-size", "big"], ["image_size", "'big'", "whole number"]),
        (["--split", "random"], ["split", "'random'", "expected grouped or official"]),
        (["--split", "official", "--split-file", __file__], ["split official and split_file", "one of them"]),
        (["--folds", "0"], ["folds", "'0'", "the least is 1"]),
        (["--folds", "2", "--workers", "3"], ["workers 3 with folds 2", "whole folds"]),
        (["--ensemble", "--workers", "6"], ["workers 6 with folds 5", "whole folds"]),
        (["--ensemble", "--folds", "1"], ["ensemble with folds 1", "give more folds"]),
        (["--gpus-per-worker", "1.5"], ["gpus_per_worker", "1.5", "whole"]),
        (["--batch-size", "9", "--workers", "2"], ["batch_size 9", "workers 2"]),
        (["--batch-size", "2", "--workers", "2"], ["batch_size 2", "at least two"]),
        (["--gpus-per-worker", "0.5", "--workers", "2"], ["gpus_per_worker 0.5", "whole one"]),
        (["--study", "nonsense"], ["study", "'nonsense'", "database URL"]),
        (["--study", "postgresql://me@db/x?password=hush"], ["study", "PGPASSWORD"]),
        (["--track", "http://host:5000"], ["track", "'http://host:5000'", "mlflow:http://HOST:PORT"]),
        (["--track", "mlflow:databricks"], ["track", "'mlflow:databricks'", "mlflow:http://HOST:PORT"]),
        (["--class-map", "benign"], ["class_map", "'benign'", "FOLDER=CLASS"]),
        (["--class-map", "a=x,b=y,a=y"], ["class_map", "a twice"]),
        (["--data", "no/such/folder"], ["no/such/folder", "not a folder"]),
        (["--name", "a/b"], ["name", "'a/b'"]),
        (["--resume", "results/lung"], ["resume = 'results/lung'", "the name of a search", "--storage"]),
        (["--settings", "no.yaml"], ["no.yaml", "cannot be read"]),
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_rule(arguments: list[str], says: list[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        read_settings(arguments)
    for words in says:
        assert words in str(refusal.value)


def test_a_password_for_mlflow_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        read_settings(["--track", "mlflow:http://me:secret@host:5000"])
    assert "host:5000" in str(refusal.value) and "secret" not in str(refusal.value)


def test_an_unknown_key_of_the_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trails: 7\n")
    with pytest.raises(
        SettingsError, match=r"trails: no such setting \(did you mean trials\?\); the settings are .*trials"
    ):
        read_settings(["--settings", str(file)])


def test_phantoms_get_small_defaults_and_a_choice_stays(tmp_path: Path) -> None:
    phantoms, real = validate({"trials": 3}).for_data(), validate({"data": tmp_path, "trials": 3}).for_data()
    assert (phantoms.weights, real.weights) == ("none", "imagenet")
    assert (real.image_size, real.batch_size) == (224, 32)
    assert phantoms.image_size is not None and phantoms.image_size < 224
    assert phantoms.trials == real.trials == 3


@pytest.mark.parametrize(("workers", "batch"), [(1, 16), (3, 18), (16, 32), (7, 21)])
def test_the_default_batch_is_shared_evenly_by_any_number_of_workers(workers: int, batch: int) -> None:
    assert validate({"workers": workers}).for_data().batch_size == batch


def test_the_kept_settings_give_the_same_settings() -> None:
    import yaml

    settings = validate({"trials": 3, "study": "postgresql://me@db/optuna", "data": "s3://bucket/ct"}).for_data()
    assert validate(yaml.safe_load(settings.as_yaml())) == settings


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hush@db/x",
        "postgresql://me:hu@sh@db/x",
        "postgresql://me@db/x?password=hush",
        "postgresql://me@db/x?sslmode=require&sslpassword=hush",
        "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhush",
        "postgresql//me:hush@db/x",
        "postgresql://me:hush@db:port/x",
    ],
)
def test_a_password_in_the_studys_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text in (f"study: {url}", f"study: ['{url}", f"- {url}"):
        file.write_text(text)
        for arguments in (["--study", url], ["--settings", str(file)]):
            with pytest.raises(SettingsError) as refusal:
                read_settings(arguments)
            assert "hu" not in str(refusal.value) and "sh" not in str(refusal.value).replace("dashboard", "")


def test_other_options_in_the_studys_url_are_kept() -> None:
    url = "postgresql://me@db/x?sslmode=verify-full&sslkey=/keys/me&passfile=/keys/pgpass"
    assert validate({"study": url}).study == url


@pytest.mark.parametrize(
    ("window", "means"),
    [("lung", (-600, 1500)), ("mediastinum", (50, 350)), ("-600,1500", (-600, 1500)), ("40, 1.5", (40, 1.5))],
)
def test_a_window_has_a_name_or_a_center_and_a_width(window: str, means: tuple[float, float]) -> None:
    settings, _ = read_settings([f"--window={window}"])
    assert settings.ct_window == means
    assert read_settings(flags(settings.model_dump(), ["window"]))[0] == settings


@pytest.mark.parametrize("window", ["bone", "1", "1,2,3", "a,b", "0,0.5", "nan,400", "40,inf", "1e9,400"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(SettingsError, match=r"window = .*: expected lung, mediastinum or CENTER,WIDTH"):
        read_settings(["--window", window])


def test_images_may_be_a_uri_and_a_folder_may_be_written_as_one(tmp_path: Path) -> None:
    assert validate({"data": "s3://bucket/ct"}).with_absolute_paths().data == "s3://bucket/ct"
    assert validate({"data": f"file://{tmp_path}"}).data == validate({"data": str(tmp_path)}).data == tmp_path
    (tmp_path / "two words").mkdir()
    assert validate({"data": f"file://{tmp_path}/two%20words"}).data == tmp_path / "two words"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: it was for weights and storage only, where no shell had replaced it before."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("table", "space", "split_file", "weights")
    for name in names:
        (tmp_path / name).touch()
    settings = validate({"data": "~", **{name: f"~/{name}" for name in names}}).with_absolute_paths()
    assert settings.data == tmp_path
    assert all(str(getattr(settings, name)) == str(tmp_path / name) for name in names)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trials: yes", "trials = True: true or false"),
        ("seed: true", "seed = True"),
        ("cpus_per_worker: .inf", "cpus_per_worker = inf"),
        ("checkpoint_interval: .nan", "checkpoint_interval = nan"),
        ("study: ''", "study = '': it is empty"),
        ("storage: '://'", "storage = '://': expected a folder"),
        ("storage: s3:/bucket/x", "storage = 's3:/bucket/x': expected a folder, or a URI"),
        ("data: 5", "data = 5: expected the path of a file or folder"),
        ("data: [a]", "data = ['a']: expected the path"),
        ("space: {a: b}", "space = {'a': 'b'}: expected the path"),
        ("trials: 3\ntrials: 4", "the key 'trials' is there twice"),
        ("name: 2024", "in YAML, put it into quotes"),
        ("trails:", "no such setting (did you mean trials?)"),
        ('data: "a\\0b"', "not UTF-8"),
        ("- a", "expected lines of"),
    ],
)
def test_a_file_that_says_something_else_than_it_seems_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(SettingsError) as refusal:
        read_settings(["--settings", str(tmp_path / "x.yaml")])
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_key_without_a_value_is_left_out(tmp_path: Path) -> None:
    """Found: a search that was resumed with such a file had no number of trials."""
    (tmp_path / "x.yaml").write_text("trials:\nworkers: null\nstorage: ~\nseed: 3\n")
    settings, given = read_settings(["--settings", str(tmp_path / "x.yaml"), "--resume", "one"])
    assert settings.workers == 1 and given == {"seed", "resume"}


def test_folders_may_be_named_as_yaml_names_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("class_map: {0: normal, 1: adenocarcinoma, yes: squamous cell carcinoma}")
    settings, _ = read_settings(["--settings", str(tmp_path / "x.yaml")])
    assert settings.class_map == {"0": "normal", "1": "adenocarcinoma", "yes": "squamous cell carcinoma"}


@pytest.mark.parametrize("words", [["--study", ""], ["--study="], ["--settings", ""], ["--data", "M\udcfcller"]])
def test_empty_arguments_and_bytes_that_are_no_text_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_settings(words)
    assert "is empty; give a value" in (said := capsys.readouterr().err) or r"M\udcfcller" in said
