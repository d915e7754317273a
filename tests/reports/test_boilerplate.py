"""Methods text of both levels, its citations, and its files."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.engine.bundle import PACKAGED, load_bundle
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.bias import (
    CROSSED,
    LINEAR,
    MIXED,
    REPEATED,
    Bias,
)
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.preprocessing.brain_extraction.masks import PROGRAMS
from bids_uad.reports import boilerplate
from bids_uad.reports.bibliography import (
    cited_keys,
    entry_html,
    methods_html,
    read_entries,
)
from bids_uad.reports.boilerplate import (
    UsedModel,
    assets,
    bibliography,
    methods_text,
    write_citation,
)
from bids_uad.reports.group_methods import group_methods_text
from bids_uad.reports.pathways import EXTRACTED, Pathway
from tests.evaluation.fake_tables import write_cohort

WHOLE_HEAD = Pathway("T1w", EXTRACTED, skull_stripped=False, extraction="combined")
WITHOUT_DOI = {"niworkflows", "nireports", "sklearn", "holm", "demsar"}
MODELS = [
    UsedModel("disyre", "T1w", "lite", 0.03125, "max_dice"),
    UsedModel("patchcore", "T2w", "lite", 0.84, "fpr_1pct"),
    UsedModel("uniad", "T1w", "paper", 120.0, "own_choice"),
]


def test_bibliography_entries_are_read_completely():
    text = (assets() / "bids_uad.bib").read_text(encoding="utf-8")
    found = bibliography()
    assert len(found) == len(re.findall(r"^@\w+\{", text, re.MULTILINE)) == len(set(found))
    assert {key for key, entry in found.items() if "doi" not in entry} == WITHOUT_DOI
    for key, entry in found.items():
        assert {"author", "title", "year"} <= set(entry), key
        assert re.fullmatch(r"10\.\d{4,}/\S+", entry["doi"]) if "doi" in entry else "url" in entry, key
        assert not re.search(r"[{}\\]", entry_html(entry)), key


def test_all_citations_of_the_methods_text_resolve():
    text = methods_text(MODELS)
    assert set(cited_keys(text)) <= set(bibliography())
    assert "$" not in text


def test_all_citations_in_the_package_resolve():
    package = Path(str(resources.files("bids_uad")))
    sources = [*sorted((package / "preprocessing").glob("*.py")), package / "reports" / "pathways.py"]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    cited = set(cited_keys("\n".join(re.findall(r"\[[^\[\]\n]*@[^\[\]\n]*\]", text))))
    for source in (package / "methods").glob("*.py"):
        cited |= set(re.findall(r'citation: ClassVar\[str\] = "(\w+)"', source.read_text(encoding="utf-8")))
    for source in (Path(str(assets())) / "methods").glob("*.md"):
        cited |= set(cited_keys(source.read_text(encoding="utf-8")))
    cited |= set(cited_keys(" ".join(boilerplate.REGION_SOURCES.values())))
    cited |= {program.citation for program in PROGRAMS.values()}
    assert cited == set(bibliography())


def test_methods_text_names_models_and_thresholds():
    text = methods_text(MODELS, version="9.8.7")
    assert "9.8.7" in text
    assert "Disyre on T1w (preset `lite`)" in text
    assert "Disyre on T1w: 0.03125 (best Dice on validation lesions)" in text
    assert "PatchCore on T2w: 0.84 (1 % false positives in healthy validation brains)" in text
    assert "UniAD on T1w: 120 (own_choice)" in text
    assert "Ground truth" not in text
    assert "3 x 3 x 3 neighbours" in text


def test_methods_text_describes_the_protocol_of_the_preset():
    paper = UsedModel("andi", "T2w", "paper", 2.1e-5, "max_dice")
    text = methods_text([paper])
    assert "4 x 4 x 4 voxels" in text
    assert "3 x 3 x 3" not in text
    assert "3 x 3 x 3" in methods_text([paper, *MODELS])


def test_methods_text_names_versions_training_and_regions():
    bundle = load_bundle(PACKAGED / "disyre-T1w-lite")
    models = [
        UsedModel(name, "T1w", "lite", 0.1, "max_dice", bundle.info["training"]) for name in ("disyre", "rd")
    ]
    text = methods_text(models, pathways={WHOLE_HEAD: 1}, parcellations=["LPBA40", "Own"])
    assert "healthy brains: 80 scans of 80 subjects (Synthetic brains, seed 1" in text
    assert "): Disyre on T1w, RD on T1w." in text
    assert "[@synthseg]" in text
    assert "[@synthseg; @synthsr]" in text
    assert "regions of LPBA40 [@lpba40] and Own that" in text
    for package in ("nipype", "torch", "antspyx", "scipy"):
        assert f" {metadata.version(package)} [@" in text
    bare = methods_text(MODELS)
    assert "Training" not in bare
    assert "regions of" not in bare


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root, root, n_lesion=6, n_voxels=20_000)
    return evaluate(root, find_metrics_tables(root), read_participants(root), seed=0)


def test_group_text_describes_the_analyses_of_the_cohort(cohort):
    analyses = analyse(cohort.subjects, cohort.cohort_curves, ("lesion load",), seed=3)
    text = group_methods_text(cohort, analyses, seed=3)
    assert set(cited_keys(text)) <= set(bibliography())
    assert "$" not in text
    images = cohort.subjects["source_image"].nunique()
    assert f"{images} images of {cohort.subjects['participant_id'].nunique()} participants" in text
    assert "(2000 resamples, seed 3)" in text
    assert "@wilcoxon" in text
    assert "26-connected components of at least 3 mm³" in text
    assert "Disyre on T1w: " in text
    # Too few participants for a model, and no subgroups requested.
    assert "@statsmodels" not in text
    assert "@hedges" not in text
    assert "Other models" not in text
    variants = pd.DataFrame({"variant": ["reference", "tenth", "third", "tenth"]})
    assert "differently (tenth and third)" in group_methods_text(cohort, analyses, variants, seed=3)


def test_group_text_describes_the_bias_models(cohort):
    analyses = analyse(cohort.subjects, cohort.cohort_curves, (), seed=0)
    rows = [
        {"term": term, "model": model}
        for term, model in (("age", LINEAR), ("scanner: A", LINEAR), ("scanner (SD)", MIXED))
    ]
    subgroups = pd.DataFrame({"factor": ["sex", "age", "sex", "scanner"]})
    asked = replace(analyses, subgroups=subgroups, bias=Bias(pd.DataFrame(rows), [], []))
    text = group_methods_text(cohort, asked, seed=0)
    assert "subgroups of the cohort by sex, age and scanner," in text
    assert "regressed on age and scanner," in text
    assert {"hc3", "mixed", "hedges", "statsmodels"} <= set(cited_keys(text))
    assert "mixed" not in cited_keys(
        group_methods_text(cohort, replace(asked, bias=Bias(pd.DataFrame(rows[:2]), [], [])), seed=0)
    )
    for model, scanners in ((CROSSED, True), (REPEATED, False)):
        bias = Bias(pd.DataFrame([{"term": "age", "model": model}]), [], [])
        text = group_methods_text(cohort, replace(asked, bias=bias), seed=0)
        assert "have a random intercept for each participant [@mixed]" in text
        assert ("have a random intercept for each scanner" in text) == scanners
        assert "[@hc3]" not in text


def test_citations_become_numbers_and_a_reference_list():
    html = methods_html(
        "Made with *care* [@b; @a] & [SyN; @a], <x> by @b, a@mail.org [@none].", {"a": A, "b": B}
    )
    assert html.startswith(
        '<p>Made with <em>care</em> [<a href="#ref-b">1</a>, <a href="#ref-a">2</a>] &amp; '
        '[SyN, <a href="#ref-a">2</a>], &lt;x&gt; by [<a href="#ref-b">1</a>], a@mail.org [@none].</p>'
    )
    assert html.index('id="ref-b"') < html.index('id="ref-a"')
    assert "Doe et al. (2001). Title A" in html
    assert "Roe and Poe (2002)." in html


A = {"author": "Doe, J. and Coe, K. and others", "year": "2001", "title": "Title {A}", "doi": "10.1000/a"}
B = {"author": "Roe, J. and Poe, E.", "year": "2002", "title": "B", "url": "https://b.org"}


def test_citation_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(boilerplate.shutil, "which", lambda name: None)
    stale = tmp_path / "logs" / "CITATION.html"
    stale.parent.mkdir()
    stale.write_text("<body>old</body>")

    written = write_citation(tmp_path, "Text [@n4].\n")

    write_citation(tmp_path, "Text of the group.\n", "CITATION_group")
    (tmp_path / "logs" / "CITATION_group.md").unlink()
    assert sorted(path.name for path in written) == ["CITATION.bib", "CITATION.md"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["CITATION.bib", "CITATION.md"]
    assert (tmp_path / "logs" / "CITATION.md").read_text() == "Text [@n4].\n"
    assert "n4" in read_entries((tmp_path / "logs" / "CITATION.bib").read_text())


@pytest.mark.parametrize(
    ("script", "made"),
    [
        ("cat >/dev/null; echo '<html><body>whole</body></html> \\\\end{document}'", True),
        ("cat >/dev/null; echo '<p>a fragment</p>'", False),
        ("cat >/dev/null; echo '<html><body></body></html> \\\\end{document}'; exit 3", False),
    ],
)
def test_page_is_written_only_if_the_output_of_pandoc_is_complete(tmp_path, monkeypatch, script, made):
    pandoc = tmp_path / "pandoc"
    pandoc.write_text(f"#!/bin/sh\n{script}\n")
    pandoc.chmod(0o755)
    monkeypatch.setattr(boilerplate.shutil, "which", lambda name: str(pandoc))
    write_citation(tmp_path, "Text\n")
    for kind in ("html", "tex"):
        assert (tmp_path / "logs" / f"CITATION.{kind}").is_file() == made


def test_assets_are_found_inside_the_package_first(tmp_path, monkeypatch):
    package, checkout = tmp_path / "bids_uad", tmp_path / "boilerplate"
    monkeypatch.setattr(boilerplate.resources, "files", lambda name: package)
    with pytest.raises(FileNotFoundError):
        assets()
    for folder in (checkout, package / "data" / "boilerplate"):
        folder.mkdir(parents=True)
        (folder / "bids_uad.bib").write_text("")
        assert assets() == folder


def test_used_model_is_read_from_records_of_earlier_versions():
    fields = {"detector": "pls+normative", "modality": "T1w", "preset": "default", "threshold": 3.0}
    fields |= {"threshold_name": "max_dice", "met": ["training"], "reference": "Site B", "assumed": True}
    model = UsedModel.from_record(fields)
    assert (model.seen_in, model.normative_cohort, model.imputed) == (("training",), "Site B", True)
