"""Paths with spaces, brackets, quotes, non-ASCII letters and participant labels."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from bids_uad.cli.main import main
from bids_uad.cli.parser import parse_folders
from bids_uad.config import RunConfig
from bids_uad.dataset.describe import dataset_link
from bids_uad.dataset.inputs import collect
from bids_uad.dataset.sidecars import bids_uri
from bids_uad.engine.bundle import load_bundle
from bids_uad.errors import ConfigError
from bids_uad.files import CHECKSUMS
from bids_uad.levels.participant import run, workflow
from bids_uad.levels.participant import workflow as writing
from bids_uad.levels.participant.executors import configure_nipype, make_plugins
from bids_uad.preprocessing.reference import _find_image
from bids_uad.preprocessing.registration import RegistrationSchedule, Volume, register_rigid
from bids_uad.preprocessing.resampling import resample_mask_through, write_itk
from tests.dataset.skeleton import AFFINE, write_dataset
from tests.levels.fakes import FakeDetect, fake_reference, init_fake_preproc_wf
from tests.levels.study import Study

PARTS = {
    "space": "my data",
    "brackets": "data [x]",
    "number sign": "#1",
    "percent": "100%20",
    "ampersand": "a & b",
    "quotes": 'Müller\'s "data"',
    "braces": "{0} {name}",
    "composed": "é",
    "decomposed": "e\u0301",
    "comma": "Doe, Jane (2024)",
    "star": "a*b?",
    "label": "sub-02",
    "session": "ses-x_run-3_acq-y",
    "long": "/".join(["l" * 120] * 3),
}
ALL = (
    "sub-02/ses-x/"
    + " ".join(name for key, name in PARTS.items() if key not in ("label", "long"))
    + "/sub-01"
)
EVERY_PART = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run all levels, with stand-ins for preprocessing and detection, below a folder of a bad name."""
    root = tmp_path_factory.mktemp("odd")
    study = Study(root / ALL).write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "init_preproc_wf", init_fake_preproc_wf)
        patch.setattr(writing, "Detect", FakeDetect)
        reference = fake_reference(study.folder)
        patch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
        for level in ("participant", "group", "train", "calibrate"):
            CHECKSUMS.clear()
            assert main(study.arguments(level)) == 0, level
        yield study


class Links(HTMLParser):
    """Collects what a page links to and shows."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "data", "xlink:href") and value:
                self.found.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)


def test_every_image_has_all_outputs_under_its_label(finished):
    images = {path.name.split("_space-")[0] for path in finished.out.rglob("*_metrics.tsv")}
    assert images == {"sub-01", "sub-02"}
    assert len(list(finished.out.rglob("sub-*/anat/*_metrics.tsv"))) == 3
    assert len(list(finished.out.rglob("*desc-manual_mask.nii.gz"))) == 1
    assert (finished.out / "group.html").is_file()
    assert load_bundle(finished.trained / "intensity-T2w-lite").thresholds


@pytest.mark.parametrize("page", ["sub-01.html", "sub-02.html", "group.html"])
def test_links_and_images_of_pages_resolve(finished, page):
    page = finished.out / page
    links = Links(page)
    relative = [url for url in links.found if not urlsplit(url).scheme]
    assert relative
    for url in relative:
        if url.startswith("#"):
            assert unquote(url[1:]) in links.ids, url
        else:
            assert (page.parent / unquote(urlsplit(url).path)).is_file(), url


def test_dataset_links_and_sources_lead_to_the_files(finished):
    links = json.loads((finished.out / "dataset_description.json").read_text())["DatasetLinks"]
    roots = {name: (finished.out / unquote(link)).resolve() for name, link in links.items()}
    assert roots == {"raw": finished.raw.resolve(), "lesions": finished.lesions.resolve()}
    sources = [
        source
        for path in finished.out.rglob("sub-*/anat/*.json")
        for source in json.loads(path.read_text()).get("Sources", [])
    ]
    assert len(sources) > 20
    for source in sources:
        _, name, path = source.split(":", 2)
        assert (roots.get(name, finished.out) / unquote(path)).is_file(), source


def test_configuration_file_round_trip(finished):
    (file,) = (finished.out / "logs").glob("bids_uad-*.toml")
    config = RunConfig.from_toml(file.read_text(encoding="utf-8"))
    assert (config.bids_dir, config.output_dir) == (finished.raw, finished.out)
    assert config.derivatives == {"lesions": finished.lesions}
    assert config.models == tuple(map(str, finished.models))


def test_lost_file_is_restored_from_the_outputs_of_preprocessing(finished):
    calls = finished.folder / "calls.txt"
    calls.unlink()
    (lost,) = finished.out.rglob("sub-02_space-SRI24_label-anomaly_desc-T1wDisyre_mask.nii.gz")
    before = lost.read_bytes()
    lost.unlink()
    CHECKSUMS.clear()
    assert main(finished.arguments("participant")) == 0
    assert lost.read_bytes() == before
    assert calls.read_text().splitlines() == ["detect sub-02_T1w disyre-T1w"]


def test_failed_node_is_reported_with_its_crash_file(finished, capsys):
    name = "sub-crash/anat/sub-crash_T1w.nii.gz"
    write_dataset(finished.raw, {name: None})
    CHECKSUMS.clear()
    assert main([*finished.arguments("participant"), "--participant-label", "crash"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "ZeroDivisionError: nothing to divide by" in said
    (crash,) = (finished.out / "sub-crash" / "log").rglob("crash*.txt")
    assert os.fspath(finished.out).split("/sub-01/")[0].split()[-1] in said
    assert "ZeroDivisionError" in crash.read_text()
    page = finished.out / "sub-crash.html"
    assert "nothing to divide by" in page.read_text(encoding="utf-8")


@EVERY_PART
def test_entities_are_read_below_the_dataset_only(tmp_path, part):
    root = tmp_path / part / "raw"
    write_dataset(
        root, {"sub-01/anat/sub-01_T1w.nii.gz": None, "sub-03/ses-a/anat/sub-03_ses-a_T1w.nii.gz": None}
    )
    units = collect(RunConfig(root, tmp_path / "out", ("participant",), tmp_path / "work")).units
    assert [unit.key for unit in units] == ["sub-01_T1w", "sub-03_ses-a_T1w"]
    assert all(unit.path.is_file() for unit in units)


@EVERY_PART
def test_ants_works_in_any_folder_and_with_files_from_any_folder(tmp_path, part):
    folder = tmp_path / part
    folder.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij"))
    data = (np.exp(-4 * ((grid - 0.1) ** 2).sum(0)) * 100).astype(np.float32)
    fixed = Volume(data, AFFINE, np.ones(data.shape, bool))
    before = Path.cwd()
    found = register_rigid(fixed, fixed, np.eye(4), folder, RegistrationSchedule((5,), (2,), (0,), 1.0))
    np.testing.assert_allclose(found, np.eye(4), atol=0.2)
    write_itk(folder / "shift_xfm.txt", np.eye(4))
    mask = data > 50
    through = resample_mask_through(mask, AFFINE, mask.shape, AFFINE, [str(folder / "shift_xfm.txt")])
    assert (through == mask).all()
    assert Path.cwd() == before


@EVERY_PART
def test_an_atlas_is_found_in_any_folder(tmp_path, part):
    folder = tmp_path / part / "tpl-MNI152_desc-other" / "tpl-SRI24"
    folder.mkdir(parents=True)
    for name in (
        "res-1_desc-brain_T1w",
        "res-2_desc-brain_T1w",
        "res-1_desc-other_T1w",
        "atlas-x_desc-brain_T1w",
    ):
        (folder / f"tpl-SRI24_{name}.nii.gz").write_bytes(b"x")
    (folder / "tpl-SRI24_res-1_desc-brain_mask.nii.gz").touch()  # not downloaded yet
    assert _find_image(folder, "T1w", "brain").name == "tpl-SRI24_res-1_desc-brain_T1w.nii.gz"
    assert _find_image(folder, "mask", "brain") is None


@EVERY_PART
def test_nipype_searches_folders_and_not_patterns(tmp_path, part):
    from nipype.pipeline.engine import nodes, utils

    configure_nipype()
    folder = tmp_path / part
    folder.mkdir(parents=True)
    (folder / "_0xabc.json").touch()
    for module in (nodes, utils):
        assert module.glob(os.path.join(folder, "_0x*.json")) == [str(folder / "_0xabc.json")]  # noqa: PTH118


@EVERY_PART
def test_links_to_datasets_are_uris(tmp_path, part):
    target, start = tmp_path / part / "raw", tmp_path / part / "out"
    link = dataset_link(target, start, {})
    assert (start / unquote(link)).resolve() == target.resolve()
    assert dataset_link(tmp_path / "raw" / part, tmp_path / "raw", {}).isascii()
    uri = bids_uri("given", Path("sub-01") / part / "a+b.nii.gz")
    assert re.fullmatch(r"bids:given:[\w/.~%+-]+", uri, re.ASCII)
    assert unquote(uri) == f"bids:given:sub-01/{part}/a+b.nii.gz"
    (name,) = parse_folders([str(tmp_path / f"x{Path(part).name}")], "--derivatives")
    assert re.fullmatch(r"[\w.-]+", name, re.ASCII)


@pytest.mark.parametrize("plugin", ["SLURM", "SLURMGraph"])
@EVERY_PART
def test_slurm_plugins_refuse_work_folders_with_special_characters(tmp_path, part, plugin):
    file = tmp_path / "plugin.yml"
    file.write_text(f"plugin: {plugin}\n")
    folders = (tmp_path / "raw", tmp_path / "out", ("participant",), tmp_path / part / "work")
    config = RunConfig(*folders, plugin_file=file)
    fine = [PARTS[name] for name in ("composed", "decomposed", "label", "session", "long")]
    if part in fine:
        make_plugins(config, print)
        return
    with pytest.raises(ConfigError, match="cluster jobs cannot use; choose another with -w"):
        make_plugins(config, print)
