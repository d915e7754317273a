import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bids_uad.cli.parser import (
    build_parser,
    build_scans_parser,
    build_training_parser,
    parse_args,
    parse_folders,
    subcommand_of,
)
from bids_uad.config import RunConfig
from bids_uad.constraints import annotations, is_constrained
from bids_uad.errors import ConfigError, ExitCode


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    return root


@pytest.fixture
def parse(dataset, tmp_path):
    def run(*extra, levels=("participant",), bids=dataset, out=None):
        return parse_args(
            [str(bids), str(out or tmp_path / "out"), *levels, "-w", str(tmp_path / "w"), *extra]
        )

    return run


def test_defaults(parse, dataset, tmp_path):
    config = parse()
    assert (config.bids_dir, config.output_dir) == (dataset, tmp_path / "out")
    assert config.levels == ("participant",)
    assert config.modalities == ("T1w", "T2w", "FLAIR")
    assert (config.device, config.random_seed, config.omp_nthreads) == ("auto", 0, 1)
    assert (config.precision, config.batch_size, config.compiled) == ("auto", None, False)
    assert config.nprocs >= 1
    assert config.mem_gb > 0


def test_prefixes_and_duplicates_of_labels_are_removed(parse):
    config = parse("--participant-label", "sub-01", "02", "01", "--session-id", "ses-a")
    assert config.participants == ("01", "02")
    assert config.sessions == ("a",)
    assert parse("--participant_label", "7").participants == ("7",)


def test_execution_options(parse):
    config = parse("--precision", "bf16", "--batch-size", "4", "--compile")
    assert (config.precision, config.batch_size, config.compiled) == ("bf16", 4, True)


def test_levels_are_sorted(parse):
    assert parse(levels=("group", "participant")).levels == ("participant", "group")


@pytest.mark.parametrize("flag", ["--nprocs", "--nthreads", "--n-cpus", "--n_cpus"])
def test_aliases_of_nprocs(parse, flag):
    assert parse(flag, "3").nprocs == 3


@pytest.mark.parametrize("flag", ["--mem", "--mem-mb", "--mem_mb"])
def test_bare_memory_is_megabytes(parse, flag):
    assert parse(flag, "16000").mem_gb == 16.0


def test_options_of_fmriprep_without_effect_are_accepted(parse, capsys):
    options = ("--notrack", "--skip-bids-validation", "--skip_bids_validation", "--output-layout", "bids")
    changed = dataclasses.asdict(parse(*options))
    assert changed | {"run_id": ""} == dataclasses.asdict(parse()) | {"run_id": ""}
    with pytest.raises(SystemExit, match="2"):
        parse("--output-layout", "legacy")
    assert "'legacy' is not supported; the outputs are always a dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unknown", "words"),
    [
        (["--participants-label", "01"], "--participants-label; did you mean --participant-label?"),
        (["--Output-Layout=bids"], "--Output-Layout; did you mean --output-layout?"),
        (["--lowmem"], "--lowmem; did you mean --low-mem?"),
        (["--fs-license-file", "x"], "--fs-license-file; "),
        (["--min-lesion-sz", "3"], "--min-lesion-sz; did you mean --min-lesion-size?"),
        (["--zzzzqq"], "--zzzzqq; --help lists all options"),
        (["--nproc", "2"], "--nproc; did you mean --nprocs?"),  # no abbreviation
    ],
)
def test_unknown_option_is_refused_with_the_nearest_name(parse, capsys, unknown, words):
    with pytest.raises(SystemExit, match="2"):
        parse(*unknown)
    assert f"error: unknown option {words}" in capsys.readouterr().err


def test_unknown_option_before_the_level_is_named(capsys):
    """Not its value, which argparse would take for a level."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(["data", "out", "--partecipant-label", "01", "participant"])
    assert "unknown option --partecipant-label; did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nprocs", "0"],
        ["--mem", "lots"],
        ["--device", "gpu"],
        ["--precision", "fp16"],
        ["--batch-size", "0"],
        ["--device", "cuda:x"],
        ["--participant-label", "a_b"],
        ["--modalities", "PDw"],
        ["--participant", "01"],
        ["--unknown"],
    ],
)
def test_malformed_arguments_are_usage_errors(parse, arguments):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2


def test_unknown_level_is_a_usage_error(parse):
    with pytest.raises(SystemExit) as stop:
        parse(levels=("session",))
    assert stop.value.code == 2


def test_help_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "--participant-label LABEL ..." in text
    assert "--participant_label" not in text


@pytest.mark.parametrize("parser", [build_parser(), build_scans_parser(), build_training_parser("train")])
def test_help_lists_all_exit_codes(parser):
    epilog = " ".join(parser.format_help().split("Exit codes: ")[1].split())
    assert re.findall(r"(?:^|; )(\d+) \w", epilog) == [str(int(code)) for code in ExitCode]


def test_help_of_the_levels_has_about_a_line_per_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = build_parser().format_help()
    assert len(text.splitlines()) <= 75
    assert "{train,calibrate,simulate,atlas,extraction}" in text
    assert "--detector" not in text


@pytest.mark.parametrize(
    ("command", "own", "other"),
    [("train", "--steps", "--normative"), ("calibrate", "--normative-dir", "--steps")],
)
def test_help_of_training_lists_its_own_options(command, own, other):
    text = build_training_parser(command).format_help()
    assert own in text
    assert other not in text
    assert "--participant-label" not in text
    assert "--recontrast" not in text.replace("--contrast-transfer, --recontrast", "")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("train scans models", "train"),
        ("train scans train", "train"),
        ("simulate --help", "simulate"),
        ("train", "train"),
        ("train out participant", None),
        ("atlas out group --nprocs 2", None),
        ("./train out participant", None),
        ("raw out train", None),
        ("scan.nii.gz out", "scans"),
        ("a.nii b.NII.GZ out --modality T1w", "scans"),
        ("--modality T1w scan.nii.gz out", "scans"),
        ("scan.nii.gz --help", "scans"),
        ("scan.nii.gz out participant", "scans"),
        ("raw out", None),
        ("--bids-filter-file x raw.nii out participant", None),
        ("", None),
    ],
)
def test_subcommand_of_tells_datasets_from_subcommands(line, command):
    assert subcommand_of(line.split()) == command


def test_subcommand_of_tells_folders_of_scans_from_datasets(dataset, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "sub-01_T1w.nii.gz").touch()
    (folder / "scan.mgz").touch()
    assert subcommand_of([str(folder), "out"]) == "scans"
    assert subcommand_of([str(folder), "out", "--modality", "T1w"]) == "scans"
    assert subcommand_of([str(folder / "scan.mgz"), "out"]) == "scans"
    for rest in (["out", "particpant"], ["out", "-w", "work", "participant"]):
        assert subcommand_of([str(folder), *rest]) is None
    for rest in (["out"], ["out", "-w", "work"]):
        assert subcommand_of([str(dataset), *rest]) is None
    (folder / "sub-01").mkdir()
    assert subcommand_of([str(folder), "out"]) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raw out", "the following arguments are required: {participant,group}"),
        ("raw out particpant", "argument {participant,group}: invalid choice: 'particpant'"),
        ("raw out -w work particpant", "argument {participant,group}: invalid choice: 'particpant'"),
        ("scan.nii.gz", "the following arguments are required: output_dir"),
    ],
)
def test_missing_and_misspelt_arguments_are_named(dataset, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        parse_args(line.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_scans_have_the_options_of_the_participant_level(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "a_T1w.nii b.nii.gz out --modality T2w --models pls --device cpu --nprocs 2 -v"
    config = parse_args(line.split())
    assert config.levels == ("scans",)
    assert config.scans == (str(tmp_path / "a_T1w.nii"), str(tmp_path / "b.nii.gz"))
    assert (config.modality, config.models, config.nprocs) == ("T2w", ("pls",), 2)
    assert (config.output_dir, config.bids_dir) == (tmp_path / "out", tmp_path / "out" / "bids")
    assert config.work_dir == tmp_path / "out" / "work"
    assert parse_args([*line.split(), "-w", "w"]).work_dir == tmp_path / "w"
    with pytest.raises(ConfigError, match="'group' needs a BIDS dataset"):
        parse_args(["a_T1w.nii", "out", "group"])
    with pytest.raises(ConfigError, match=r"must be the output folder; b\.nii is a file"):
        parse_args(["a_T1w.nii", "b.nii"])


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_subcommand_and_deprecated_level_give_the_same_configuration(tmp_path, command):
    chosen = ["--detector", "fpi", "--modality", "T2w", "--seed", "3", "--hyper", "a=1"]
    folders = [str(tmp_path / "scans"), str(tmp_path / "models")]
    new = parse_args([command, *folders, *chosen])
    old = parse_args([*folders, command, *chosen])
    assert (new.levels, new.detector, new.hyper) == ((command,), "pls", ("a=1",))
    assert replace(new, run_id="x") == replace(old, run_id="x")


def test_a_dataset_may_be_called_like_a_subcommand(dataset, tmp_path, monkeypatch):
    dataset.rename(tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    config = parse_args(["train", "out", "participant"])
    assert (config.bids_dir, config.levels) == (tmp_path / "train", ("participant",))


def test_version_and_help_succeed(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            parse_args([flag])
        assert stop.value.code == 0
    assert "--participant-label" in capsys.readouterr().out


def test_parse_folders_splits_at_the_first_equals_sign():
    found = parse_folders(["lesions=/a/b=c/d", "/data/x=y/masks", "/plain/fmriprep"], "--derivatives")
    assert found == {
        "lesions": Path("/a/b=c/d"),
        "masks": Path("/data/x=y/masks"),
        "fmriprep": Path("/plain/fmriprep"),
    }


@pytest.mark.parametrize("items", [["a=/x", "a=/y"], ["/x/a", "/y/a"], ["a="]])
def test_ambiguous_derivatives_are_refused(items):
    with pytest.raises(ConfigError, match="--derivatives"):
        parse_folders(items, "--derivatives")


def test_experiments_must_be_other_folders(parse, tmp_path):
    (tmp_path / "tenth").mkdir()
    config = parse("--experiments", str(tmp_path / "tenth"), f"again={tmp_path / 'tenth'}")
    assert set(config.experiments) == {"tenth", "again"}
    with pytest.raises(ConfigError, match="no such folder"):
        parse("--experiments", f"x={tmp_path / 'nowhere'}")
    config.output_dir.mkdir()
    with pytest.raises(ConfigError, match="the output folder itself"):
        parse("--experiments", f"x={config.output_dir}")


def test_derivatives_option_may_be_repeated(parse, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = parse("-d", f"one={tmp_path / 'a'}", "-d", f"two={tmp_path / 'b'}")
    assert set(config.derivatives) == {"one", "two"}


def test_invalid_folders_are_refused(parse, dataset, tmp_path):
    with pytest.raises(ConfigError, match="the output folder is the dataset itself"):
        parse(out=dataset)
    with pytest.raises(ConfigError, match="inside the dataset"):
        parse("-w", str(dataset / "work"))
    with pytest.raises(ConfigError, match="inside the work folder"):
        parse(out=tmp_path / "w" / "out")
    with pytest.raises(ConfigError, match="does not exist"):
        parse(bids=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--atlas-dir"):
        parse("--atlas-dir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no such folder"):
        parse("-d", f"lesions={tmp_path / 'nowhere'}")
    (dataset / "dataset_description.json").unlink()
    with pytest.raises(ConfigError, match=r"has no dataset_description\.json"):
        parse()


def test_output_may_lie_inside_the_dataset(parse, dataset):
    assert parse(out=dataset / "derivatives" / "uad").output_dir == dataset / "derivatives" / "uad"


def test_group_does_not_need_the_raw_dataset(parse, tmp_path):
    with pytest.raises(ConfigError, match="run the participant level first"):
        parse(levels=("group",), bids=tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    assert parse(levels=("group",), bids=tmp_path / "nowhere").levels == ("group",)


def test_toml_round_trip(parse, tmp_path):
    (tmp_path / "l").mkdir()
    config = parse(
        "-d", f"lesions={tmp_path / 'l'}", "--models", "a", "b", "--batch-size", "5", "-vv", "--mem", "2G"
    )
    assert RunConfig.from_toml(config.to_toml()) == config


def test_command_line_wins_over_the_configuration_file(parse, tmp_path):
    earlier = parse("--nprocs", "3", "--random-seed", "9", "--participant-label", "01", "--dry-run", "-v")
    file = tmp_path / "earlier.toml"
    file.write_text(earlier.to_toml())
    config = parse("--config-file", str(file), "--random-seed", "4")
    assert (config.nprocs, config.random_seed, config.participants) == (3, 4, ("01",))
    assert config.run_id != earlier.run_id
    assert not config.dry_run
    assert config.verbosity == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nprocs = ", "not valid TOML"),
        ("n_procs = 3", "unknown key"),
        ('nprocs = "3"', r"The 'nprocs' key of the configuration file must be an int .* Got '3' instead"),
        ("nprocs = true", "Got True instead"),
        ("models = 'a'", "The 'models' key of the configuration file must be a tuple .* Got 'a' instead"),
        ("nprocs = 0", "Got 0 instead"),
        ("mem_gb = nan", "'mem_gb' key .* Got nan instead"),
        ("modalities = ['PDw']", r"one of \{'T1w', 'T2w', 'FLAIR'\}, ...\).* Got \['PDw'\] instead"),
        ("random_seed = -1", "Got -1 instead"),
        ("train_fraction = 1.5", r"in the range \(0, 1\]. Got 1.5 instead"),
        ("brain_extraction = 'bet'", "Got 'bet' instead"),
        ("atlas_dir = 3", "must be a path or None. Got 3 instead"),
        ("experiments = {a = 3}", "'experiments' key .* Got {'a': 3} instead"),
    ],
)
def test_bad_configuration_files_are_refused(parse, tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config-file", str(file))


def test_renamed_keys_of_configuration_files_are_read(parse, tmp_path):
    file = tmp_path / "old.toml"
    file.write_text("strata = ['age']\nrecontrast = true\n")
    config = parse("--config-file", str(file))
    assert (config.subgroups, config.contrast_transfer) == (("age",), True)


def test_cohorts_and_subgroups(parse, tmp_path):
    (tmp_path / "out").mkdir()
    config = parse(levels=("group",))
    assert config.cohort is None
    assert config.subgroups == ("sex", "age", "scanner", "scanner_seen", "lesion load")
    config = parse("--cohort", "site", "--subgroups", "Manufacturer", "age", levels=("group",))
    assert (config.cohort, config.subgroups) == ("site", ("Manufacturer", "age"))


# Values that are not allowed, of each field whose type alone does not say what is.
ILLEGAL = {
    "levels": [(), ("session",), "group"],
    "scans": [("",), "a"],
    "participants": [("sub-01",), ("",), "01"],
    "sessions": [("a_b",)],
    "derivatives": [{"": Path("x")}, {"a": "x"}, ()],
    "modalities": [(), ("PDw",)],
    "models": [("",), "all"],
    "deviations": [("normal",)],
    "decision_rule": ["median"],
    "brain_extraction": ["bet", None],
    "output_spaces": [("MNI152NLin6Asym",), ("SRI24:res-2",), "orig"],
    "min_lesion_size": [-1.0, float("nan")],
    "min_counted_volume": [-1.0, float("nan"), float("inf"), None],
    "device": ["gpu", "cuda:x", "cuda:"],
    "precision": ["fp16", None],
    "batch_size": [0, 2.0],
    "random_seed": [-1, 2**32, None],
    "nprocs": [0, -1, None],
    "omp_nthreads": [0],
    "mem_gb": [0.0, float("nan"), float("inf")],
    "n_gpu_procs": [0],
    "verbosity": [-1],
    "detector": [""],
    "preset": ["", None],
    "modality": ["PDw"],
    "steps": [0],
    "hyper": [("",)],
    "experiments": [{"a": None}],
    "cohort": [""],
    "subgroups": [("",), "age"],
    "train_fraction": [0.0, 1.5],
    "synthetic": [-1],
    "label_maps": [("",)],
    "num_devices": [0],
    "num_nodes": [0],
    "run_id": [""],
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_run_config_refuses_values_that_are_not_allowed(name):
    plain = {
        "bids_dir": Path("x"),
        "output_dir": Path("y"),
        "levels": ("participant",),
        "work_dir": Path("w"),
    }
    for value in ILLEGAL[name]:
        with pytest.raises(ConfigError, match=f"^The {name!r} parameter of RunConfig must be ") as refused:
            RunConfig(**{**plain, name: value})
        assert str(refused.value).endswith(f" Got {value!r} instead.")


def test_run_config_has_a_constraint_for_every_field():
    kinds = annotations(RunConfig)
    assert [name for name, annotation in kinds.items() if not is_constrained(annotation)] == []
    assert {name for name, annotation in kinds.items() if annotation not in (Path, Path | None, bool)} == set(
        ILLEGAL
    )


def test_negative_seed_is_refused(parse):
    with pytest.raises(
        ConfigError, match=r"'random_seed' .* in the range \[0, 4294967295\]\. Got -1 instead"
    ):
        parse("--random-seed", "-1")


def test_output_spaces(parse, capsys):
    assert parse().output_spaces == ()
    spaces = ("SRI24", "MNI152NLin2009cAsym:res-1:res-2", "T1w")
    assert parse("--output-spaces", *spaces, "T1w").output_spaces == spaces
    for text in ("MNI152NLin6Asym", "fsaverage", "MNI152NLin2009cAsym:res-native", "anat:res-2"):
        with pytest.raises(SystemExit):
            parse("--output-spaces", text)
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"'{text}' is not supported; choose from SRI24, MNI152NLin2009cAsym (also with" in message


def test_minimum_volumes_of_components_and_of_counted_lesions(parse, tmp_path, capsys):
    assert (parse().min_lesion_size, parse().min_counted_volume) == (None, 3)
    assert parse("--min-lesion-size", "0").min_lesion_size == 0
    assert parse("--min-counted-volume", "12.5").min_counted_volume == 12.5
    assert parse("--min-lesion-volume", "12.5").min_counted_volume == 12.5  # deprecated
    (tmp_path / "old.toml").write_text("min_lesion_volume = 50.0")
    assert parse("--config-file", str(tmp_path / "old.toml")).min_counted_volume == 50
    for text in ("-1", "nan", "inf", "three"):
        with pytest.raises(SystemExit):
            parse(f"--min-lesion-size={text}")
        assert f"'{text}' is not a volume in mm3 (0 or more)" in capsys.readouterr().err
