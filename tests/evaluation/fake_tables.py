"""Score tables of simulated scans with known score distributions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bids_uad.files import write_json
from bids_uad.levels.participant.completion_records import CompletionRecord, ModelRecord, read_record

EDGES = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 400)])
SHA = {"disyre": "d" * 64, "patchcore": "a" * 64}
THRESHOLD_EDGE = 300


@dataclass
class Scan:
    """Simulated scores of one image and detector."""

    subject: str
    modality: str = "T1w"
    detector: str = "disyre"
    session: str | None = None
    edges: np.ndarray = field(default_factory=lambda: EDGES)
    n_nonlesion: np.ndarray | None = None
    n_lesion: np.ndarray | None = None
    threshold: float | None = None
    sha256: str | None = None
    version: str = "0.1.0"
    seen_in_training: str = "no"
    scanner_seen: str | None = "unseen"
    min_component_volume: float | None = 0.0
    healthy_p95: float | None = None
    min_lesion_volume: float | None = 3.0
    n_components: float = 3
    n_lesions: float = 2
    n_lesions_detected: float = 1
    n_false_components: float = 2
    lesions: pd.DataFrame | None = None
    source_bytes: int = 352
    covariates: dict[str, float | None] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        """Write the two tables as the participant level does; return the metrics table."""
        prefix = f"sub-{self.subject}" + (f"_ses-{self.session}" if self.session else "")
        folder = root / f"sub-{self.subject}"
        if self.session:
            folder /= f"ses-{self.session}"
        folder /= "anat"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{prefix}_space-SRI24_desc-{self.modality}{self.detector.capitalize()}"
        n_bins = len(self.edges)
        nonlesion = np.ones(n_bins, int) if self.n_nonlesion is None else self.n_nonlesion
        threshold = self.edges[THRESHOLD_EDGE] if self.threshold is None else self.threshold
        edge = int(np.argmin(np.abs(self.edges - threshold)))
        masked = self.n_lesion is not None
        found = nonlesion[edge:].sum() + (self.n_lesion[edge:].sum() if masked else 0)
        brain = nonlesion.sum() + (self.n_lesion.sum() if masked else 0)
        pd.DataFrame(
            {
                "score_lower": self.edges,
                "score_upper": np.append(self.edges[1:], np.inf),
                "n_nonlesion": nonlesion,
                "n_lesion": self.n_lesion if masked else np.full(n_bins, np.nan),
            }
        ).to_csv(folder / f"{name}_histogram.tsv", sep="\t", index=False, na_rep="n/a")
        row = {
            "source_image": f"sub-{self.subject}/anat/{prefix}_{self.modality}.nii.gz",
            "modality": self.modality,
            "detector": self.detector,
            "preset": "default",
            "model_sha256": self.sha256 or SHA[self.detector],
            "app_version": self.version,
            "threshold": threshold,
            "threshold_name": "max_dice",
            "healthy_mean": None,
            "healthy_p95": self.healthy_p95,
            "seen_in_training": self.seen_in_training,
            "scanner_seen": self.scanner_seen,
            "brain_volume_mm3": float(brain),
            "anomaly_volume_mm3": float(found),
            "lesion_volume_mm3": float(self.n_lesion.sum()) if masked else np.nan,
            "min_component_volume_mm3": self.min_component_volume,
            "min_lesion_volume_mm3": self.min_lesion_volume,
            "n_components": self.n_components,
            "n_counted_components": self.n_components,
            "n_lesions": self.n_lesions if masked else np.nan,
            "n_lesions_detected": self.n_lesions_detected if masked else np.nan,
            "n_false_components": self.n_false_components if masked else np.nan,
        }
        if self.min_lesion_volume is None:  # as in tables of early versions
            del row["min_lesion_volume_mm3"], row["n_counted_components"]
        path = folder / f"{name}_metrics.tsv"
        pd.DataFrame([row]).to_csv(path, sep="\t", index=False, na_rep="n/a")
        written = [path, folder / f"{name}_histogram.tsv"]
        if self.lesions is not None:
            written.append(folder / f"{name}_lesions.tsv")
            self.lesions.to_csv(written[-1], sep="\t", index=False, na_rep="n/a")
        self._add_to_record(root, f"{prefix}_{self.modality}", written)
        return path

    def _add_to_record(self, root: Path, key: str, written: list[Path]) -> None:
        """Add the tables to the completion record of the image, as the participant level does."""
        names = [path.relative_to(root).as_posix() for path in written]
        source = f"{Path(names[0]).parent.as_posix()}/{key}.nii.gz"
        target = written[0].parent.parent / "log" / f"{key}.json"
        record = read_record(target) or CompletionRecord(
            key, "run", source, {"input_bytes": self.source_bytes}
        )
        model = ModelRecord(self.detector, "identity", self.covariates, names)
        write_json(target, asdict(replace(record, models={**record.models, self.detector: model})))


def beta_counts(
    generator: np.random.Generator, n_voxels: int, a: float, b: float, edges: np.ndarray = EDGES
) -> np.ndarray:
    """Draw the histogram of `n_voxels` beta-distributed scores."""
    shares = np.diff(stats.beta.cdf(np.append(edges, 1.0), a, b))
    return generator.multinomial(n_voxels, shares / shares.sum())


def write_participants(folder: Path, rows: list[dict]) -> None:
    """Write a participants.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "participants.tsv", sep="\t", index=False, na_rep="n/a")


def write_cohort(
    root: Path,
    bids_dir: Path,
    *,
    n_lesion: int = 4,
    n_healthy: int = 2,
    n_voxels: int = 400_000,
    seed: int = 0,
) -> None:
    """Write the tables of a cohort for T1w and T2w, and a better and a worse detector."""
    generator = np.random.default_rng(seed)
    rows = []
    digits = max(2, len(str(n_lesion + n_healthy)))
    for index in range(n_lesion + n_healthy):
        subject = f"{index + 1:0{digits}d}"
        healthy = index >= n_lesion
        pathology = np.nan if healthy else ("stroke", "MS", "tumour")[index % 3]
        rows.append(
            {
                "participant_id": f"sub-{subject}",
                "age": int(generator.integers(20, 85)),
                "sex": "MF"[index % 2],
                "group": "control" if healthy else "patient",
                "pathology": pathology,
            }
        )
        size = int(10 ** generator.uniform(2.3, 4.8))
        skill = generator.normal(0, 0.25)
        for modality in ("T1w", "T2w"):
            for detector, strength in (("disyre", 4.0), ("patchcore", 2.4)):
                strength *= (1.25 if modality == "T2w" else 1.0) * np.exp(skill)
                noise = 14 * np.exp(generator.normal(0, 0.12))
                n_found = int(generator.integers(0, 4))
                volumes = np.array([size - size // 3 - size // 10, size // 3, size // 10])
                lesions = pd.DataFrame(
                    {
                        "lesion": [1, 2, 3],
                        "volume_mm3": volumes,
                        "detected_fraction": np.where(np.arange(3) < n_found, 0.5, 0.0),
                        "detected": (np.arange(3) < n_found).astype(int),
                        "contrast": [1.5, -0.7, 0.2 * index],
                    }
                )
                Scan(
                    subject,
                    modality,
                    detector,
                    n_nonlesion=beta_counts(generator, n_voxels, 1.1, noise),
                    n_lesion=None if healthy else beta_counts(generator, size, strength, 10),
                    threshold=EDGES[np.searchsorted(EDGES, 0.3 if detector == "disyre" else 0.26)],
                    n_components=n_found + 1,
                    n_lesions=3,
                    n_lesions_detected=n_found,
                    n_false_components=int(generator.poisson(2)),
                    lesions=None if healthy else lesions,
                ).write(root)
    write_participants(bids_dir, rows)
