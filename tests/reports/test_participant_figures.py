"""Figures of the participant report: orientation, slices, colours, histograms."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_uad import space
from bids_uad.reports.figures.display import (
    MIDLINE_X,
    Volume,
    bounding_box,
    load_ras,
    plane,
    plane_label,
    select_slices,
    side,
)
from bids_uad.reports.figures.histogram import (
    ScoreCounts,
    display_edges,
    draw_histogram,
    rebin,
)
from bids_uad.reports.figures.overlay import ColourScale, draw_overlay, main_finding
from bids_uad.reports.figures.svg import Canvas, contour
from bids_uad.reports.figures.tiles import lay_out
from bids_uad.reports.figures.viewer import write_viewer

LEFT_FRONT_TOP = (-180.0, 190.0, 120.0)
"""RAS+ coordinates (mm) of a point left of (x = -119.5), anterior and superior to the centre of SRI24."""


def save_marker(path, orientation: str):
    """Write an image with a bright block at `LEFT_FRONT_TOP`, stored in the given voxel order."""
    data = np.zeros(space.SHAPE, np.float32)
    i, j, k = np.round(nib.affines.apply_affine(np.linalg.inv(space.AFFINE), LEFT_FRONT_TOP)).astype(int)
    data[i - 3 : i + 4, j - 3 : j + 4, k - 3 : k + 4] = 1
    image = nib.Nifti1Image(data, space.AFFINE)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
    )
    nib.save(image.as_reoriented(change), path)
    return path


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "AIR", "SPL"])
def test_display_does_not_depend_on_the_voxel_order_on_disk(tmp_path, orientation):
    volume = load_ras(save_marker(tmp_path / "marker.nii.gz", orientation))

    i, j, k = (
        int(c) for c in np.round(nib.affines.apply_affine(np.linalg.inv(volume.affine), LEFT_FRONT_TOP))
    )
    axial, coronal, sagittal = (
        plane(volume.data, name, index) for name, index in (("axial", k), ("coronal", j), ("sagittal", i))
    )
    assert axial.shape == (240, 240)
    assert coronal.shape == sagittal.shape == (155, 240)
    rows, columns = np.nonzero(axial)
    assert columns.max() < 120  # on the left: neurological convention
    assert rows.max() < 120  # anterior on top
    rows, columns = np.nonzero(coronal)
    assert columns.max() < 120
    assert rows.max() < 77  # superior on top
    rows, columns = np.nonzero(sagittal)
    assert columns.min() > 120  # anterior on the right
    assert rows.max() < 77
    assert plane_label(volume, "axial", k) == "z = 120"
    assert plane_label(volume, "sagittal", i) == "x = \N{MINUS SIGN}180 (left)"


def test_grid_annotates_the_left_side_with_l():
    data = np.zeros((60, 70, 50), np.float32)
    volume = Volume(data, np.eye(4))
    grid = lay_out([[("axial", 20), ("sagittal", 30)]], data.shape, 0, 0, 500)
    canvas = Canvas(500, 400, "labels")

    grid.annotate(canvas, volume, 10)

    texts = re.findall(r'<text x="([\d.]+)"[^>]*>([^<]*)</text>', "\n".join(canvas._parts))
    place = {words: float(x) for x, words in texts}
    axial, sagittal = grid.tiles
    middle = (grid.corner(axial)[0] + axial.width * grid.scale + grid.corner(sagittal)[0]) / 2
    assert place["L"] < place["R"] < place["P"] < place["A"]
    assert place["R"] < middle < place["P"]


def test_cropping_keeps_world_coordinates():
    affine = nib.affines.from_matvec(np.diag([1.0, 2.0, 3.0]), (-10, -20, -30))
    volume = Volume(np.arange(24).reshape(2, 3, 4), affine)

    cropped = volume.crop((slice(1, 2), slice(1, 3), slice(2, 4)))

    assert cropped.data[0, 0, 0] == volume.data[1, 1, 2]
    assert cropped.world(2, 1) == volume.world(2, 3) == -21


def test_side_is_relative_to_the_midline_of_the_grid():
    assert pytest.approx(-119.5) == MIDLINE_X
    assert [side(x) for x in (-150, -120, -90)] == ["left", "midline", "right"]


def test_bounding_box_of_an_empty_mask_is_the_grid():
    assert bounding_box(np.zeros((3, 4, 5), bool)) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_bounding_box_has_a_margin():
    mask = np.zeros((20, 20, 20), bool)
    mask[5:8, 10, 1] = True
    assert bounding_box(mask, margin=2) == (slice(3, 10), slice(8, 13), slice(0, 4))


def test_select_slices_with_anomalies():
    burden = np.zeros(100)
    burden[[40, 41, 42, 70]] = [5, 9, 8, 1]

    selected, anomalous = select_slices(burden, 10, 90, 12, max_anomalous=5, min_distance=5)

    assert anomalous == [41, 70]  # 40 and 42 are too close to 41
    assert set(anomalous) <= set(selected)
    assert len(set(selected)) == 12
    assert selected == sorted(selected)
    assert max(np.diff(selected)) <= 13
    assert selected[0] == 10
    assert selected[-1] == 90


def test_select_slices_without_anomalies_is_even():
    selected, anomalous = select_slices(np.zeros(50), 5, 45, 9)
    assert anomalous == []
    assert len(selected) == 9
    assert max(np.diff(selected)) <= 8


def test_select_slices_of_a_short_range_has_no_duplicates():
    selected, _ = select_slices(np.zeros(50), 20, 22, 9)
    assert selected == [20, 21, 22]


def test_contour_follows_the_pixel_edges():
    tile = np.zeros((10, 12))
    tile[2:5, 3:7] = 1

    path = contour(tile, 0.5, x=100, y=50, scale=2)

    numbers = np.array(re.findall(r"-?\d+(?:\.\d+)?", path), float).reshape(-1, 2)
    points = np.cumsum(numbers, axis=0)
    assert points.min(0) == pytest.approx((100 + 2 * 3, 50 + 2 * 2), abs=0.15)
    assert points.max(0) == pytest.approx((100 + 2 * 7, 50 + 2 * 5), abs=0.15)
    assert points[0] == pytest.approx(points[-1], abs=0.3)


def test_contour_of_a_zero_image_is_empty():
    assert contour(np.zeros((5, 5)), 0.5, 0, 0, 1) == ""


def test_grid_picture_has_the_slices_at_their_tiles():
    data = np.random.default_rng(0).random((20, 30, 25))
    grid = lay_out([[("axial", 3), ("coronal", 4)], [("sagittal", 5)]], data.shape, 0, 0, 300)

    sheet = grid.picture(data)

    for tile in grid.tiles:
        part = sheet[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
        np.testing.assert_array_equal(part, plane(data, tile.name, tile.index))


def test_main_finding_is_the_peak_of_the_largest_component():
    scores = np.zeros((8, 8, 8))
    scores[1, 1, 1] = 9
    scores[5:7, 5:7, 5] = 2
    scores[6, 5, 5] = 3
    components = np.zeros((8, 8, 8), int)
    components[1, 1, 1] = 1
    components[5:7, 5:7, 5] = 2
    assert main_finding(scores, components) == (6, 5, 5)


@pytest.mark.parametrize("components", [None, np.zeros((40, 40, 40), int)])
def test_main_finding_without_components_is_the_region_with_the_highest_mean(components):
    scores = np.zeros((40, 40, 40))
    scores[1, 1, 1] = 9
    scores[20:29, 18:27, 10:19] = 2
    assert main_finding(scores, components) == (24, 22, 14)


def test_colour_scale_without_findings_is_transparent():
    scale = ColourScale.of(np.linspace(0, 0.1, 1000), threshold=1.0)
    assert scale.high == pytest.approx(1.5)
    palette = scale.palette()
    assert palette[0, 3] == 0
    assert palette[scale.indices(np.array([1.0]))[0], 3] == round(0.85 * 255)  # full opacity at the threshold
    # Linear between the 90th percentile (0.09), with an opacity of 0.08, and the threshold.
    assert palette[scale.indices(np.array([0.1]))[0], 3] == pytest.approx(
        (0.08 + 0.77 * 0.01 / 0.91) * 255, abs=1
    )


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_colour_scale_of_a_constant_map_is_defined(value):
    scale = ColourScale.of(np.full(100, value), threshold=None)
    assert scale.low < scale.opaque <= scale.high
    assert np.isfinite(scale.palette()).all()


def test_overlay_shows_the_finding_on_its_side(tmp_path):
    shape = (60, 70, 50)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    brain = (grid**2).sum(0) < 0.9
    scores = np.where(brain, 0.01, 0.0).astype(np.float32)
    scores[12:20, 40:48, 20:28] = 1.0  # left, in RAS+ order
    scan = Volume(np.where(brain, 0.5, 0).astype(np.float32), np.eye(4))

    path = draw_overlay(
        tmp_path / "overlay.svg",
        scan,
        brain,
        scores,
        title="Detector <on> T1w",
        threshold=0.5,
        components=(scores > 0.5).astype(np.int32),
        lesion=scores > 0.5,
    )

    text = path.read_text()
    root = ElementTree.fromstring(text)  # noqa: S314 - written one line above
    assert "Detector <on> T1w" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    # Entries of the legend do not overlap: letters are at most 7 pixels wide on average.
    lowest = max(float(element.get("y")) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    words = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if float(e.get("y")) == lowest]
    threshold, lesion, convention = sorted(words, key=lambda element: float(element.get("x")))
    assert threshold.text == "fixed threshold \N{GREEK SMALL LETTER TAU} = 0.5"
    assert lesion.text == "lesion (ground truth)"
    assert convention.text.startswith("Neurological convention")
    assert float(threshold.get("x")) + 7 * len(threshold.text) < float(lesion.get("x"))
    start = float(convention.get("x")) - 7 * len(convention.text)
    assert float(lesion.get("x")) + 7 * len(lesion.text) < start
    three_planes = next(image for image in _images(text) if image.mode == "P")
    alpha = np.asarray(three_planes.convert("RGBA"))[..., 3]
    axial = alpha[:, : alpha.shape[1] * 50 // 180]  # the first of three planes
    columns = np.nonzero(axial > 150)[1]
    assert columns.size
    assert columns.max() < 32


def test_overlay_without_threshold(tmp_path):
    brain = np.zeros((20, 22, 24), bool)
    brain[3:17, 3:19, 3:21] = True
    scores = np.random.default_rng(0).random(brain.shape).astype(np.float32)
    scan = Volume(brain.astype(np.float32), np.eye(4))
    path = draw_overlay(tmp_path / "o.svg", scan, brain, scores, title="t", threshold=None)
    assert "threshold" not in path.read_text()


def _images(svg: str) -> list[Image.Image]:
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", svg)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_rebin_agrees_with_numpy_histogram():
    scores = np.random.default_rng(1).gamma(2.0, 1.0, 20_000)
    fine = np.append(np.linspace(0, 10, 1001), np.inf)
    counts = np.histogram(scores, fine)[0]
    coarse = np.linspace(0, 8, 17)

    fraction = rebin(fine, counts, coarse)

    np.testing.assert_allclose(fraction, np.histogram(scores, coarse)[0] / scores.size, atol=1e-12)


def test_score_counts_are_read_with_an_infinite_edge_and_missing_lesions(tmp_path):
    path = tmp_path / "x_histogram.tsv"
    path.write_text("score_lower\tscore_upper\tn_nonlesion\tn_lesion\n0\t0.5\t7\tn/a\n0.5\tinf\t3\tn/a\n")
    counts = ScoreCounts.read(path)
    assert counts.edges.tolist() == [0, 0.5, np.inf]
    assert counts.nonlesion.tolist() == [7, 3]
    assert counts.lesion is None


def test_histogram_covers_scores_and_threshold():
    counts = ScoreCounts(np.linspace(0, 10, 11), np.array([0, 0, 5, 1, 0, 0, 0, 0, 0, 0.0]), None)
    edges = display_edges(counts, threshold=7.0)
    assert edges[0] == 2
    assert edges[-1] > 7
    assert display_edges(ScoreCounts(counts.edges, counts.nonlesion * 0, None), None)[-1] == 10


def test_histogram_file_is_reproducible(tmp_path):
    table = pd.DataFrame(
        {"score_lower": [0, 1], "score_upper": [1, "inf"], "n_nonlesion": [4, 0], "n_lesion": [0, 3]}
    )
    table.to_csv(tmp_path / "h.tsv", sep="\t", index=False)
    counts = ScoreCounts.read(tmp_path / "h.tsv")
    first, second = (
        draw_histogram(tmp_path / name, counts, threshold=0.8, threshold_name="max_dice").read_bytes()
        for name in ("a.svg", "b.svg")
    )
    assert first == second
    assert b"lesion (ground truth), n = 3" in first
    assert b"max_dice" in first


CLICK = """<script>addEventListener("load", () => setTimeout(() => {
  const at = {clientX: %d, clientY: %d, bubbles: true};
  document.elementFromPoint(at.clientX, at.clientY).dispatchEvent(new MouseEvent("click", at));
}, 200));</script>"""
"""Clicks at a point of the page."""


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """Viewer of a random scan; its mask is a cube of 5 voxels, and its lesion one voxel."""
    shape = (30, 36, 32)
    brain = np.zeros(shape, bool)
    brain[4:26, 4:32, 4:28] = True
    scan = np.where(brain, np.random.default_rng(0).random(shape), 0).astype(np.float32)
    mask, lesion = np.zeros(shape, bool), np.zeros(shape, bool)
    mask[8:13, 20:25, 10:15] = lesion[20, 10, 20] = True
    volume = Volume(scan, nib.affines.from_matvec(np.eye(3), (-40, -10, 5)))
    target = tmp_path_factory.mktemp("viewer") / "page.html"
    scores = np.where(mask, 2, 0.1 * scan)
    write_viewer(
        target, volume, brain, scores, title="A & B", threshold=1.0, mask=mask, components=mask, lesion=lesion
    )
    return target, volume, bounding_box(brain), mask, lesion


def sprite(page: str, name: str) -> np.ndarray:
    """Return an image of the viewer as RGBA."""
    data = re.search(rf'id="{name}Img-scan"[^>]*base64,([^"]+)', page)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def test_viewer_holds_scan_mask_and_lesion(viewer):
    target, volume, box, mask, lesion = viewer
    page = target.read_text()
    assert "<title>A &amp; B</title>" in page
    nx, ny, nz = volume.data[box].shape
    columns = sprite(page, "sprite").shape[1] // ny
    # Sagittal slices, row after row, from left to right; superior is on top.
    tiles = {
        name: np.stack(
            [
                pixels[x // columns * nz :, x % columns * ny :][:nz, :ny][::-1].transpose(1, 0, 2)
                for x in range(nx)
            ]
        )
        for name, pixels in (("sprite", sprite(page, "sprite")), ("overlay", sprite(page, "overlay")))
    }
    grey = tiles["sprite"][..., 0] / 255
    np.testing.assert_allclose(grey, volume.data[box] / volume.data.max(), atol=2 / 255)
    white = (tiles["overlay"] == 255).all(-1)
    inner = np.zeros_like(mask)
    inner[9:12, 21:24, 11:14] = True
    np.testing.assert_array_equal(white, (mask & ~inner)[box])
    cyan = (tiles["overlay"] == (0x2E, 0xE6, 0xD6, 255)).all(-1)
    np.testing.assert_array_equal(cyan, lesion[box])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_click_moves_the_crosshair_of_the_viewer(viewer, tmp_path):
    def crosshair(page):
        """Return row and column of the crosshair in the right half of a screenshot (axial plane)."""
        picture = tmp_path / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--window-size=1000,700", "--virtual-time-budget=3000", f"--screenshot={picture}"]
        # Without network, whatever the page asks for.
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        subprocess.run(["chromium", *options, page.as_uri()], check=True, capture_output=True, timeout=120)
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        blue = (pixels[..., 2] > 200) & (pixels[..., :2].max(-1) < 60)
        blue[:, :667] = False
        return blue.sum(1).argmax(), blue.sum(0).argmax()

    target, *_ = viewer
    clicked = tmp_path / "clicked.html"
    clicked.write_text(target.read_text().replace("</body>", CLICK % (900, 250) + "</body>"))
    voxel = 12  # pixels
    before, after = crosshair(target), crosshair(clicked)
    assert np.abs(np.subtract(before, (250, 900))).min() > 2 * voxel
    assert np.abs(np.subtract(after, (250, 900))).max() <= voxel
