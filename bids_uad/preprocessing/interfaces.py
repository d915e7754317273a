"""nipype interfaces of the preprocessing workflow.

Inputs from users are declared without ``exists=True``: nipype would drop the path of a deleted file and
report a missing value, while reading it raises an error with the file name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from bids_uad import space
from bids_uad.config import EXTRACTIONS, MODALITIES
from bids_uad.errors import InputError
from bids_uad.images import Grid, make_image, save_image, scale_intensity
from bids_uad.preprocessing.brain_extraction.masks import (
    BRAIN_VOLUME_RANGE_ML,
    COMBINED,
    MIN_AGREEMENT,
    NETWORK,
    PROGRAMS,
    TEMPLATE,
    air_mask,
    extract_brain,
    has_brain_volume,
    mask_from_background,
    mask_volume,
    run_external_program,
)
from bids_uad.preprocessing.check import (
    header_warnings,
    is_skull_stripped,
    read_lesion,
    read_scan,
    read_volume,
)
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.quality import (
    MIN_LOCAL_CORRELATION,
    assess_quality,
    coverage_mask,
    image_quality_metrics,
    no_signal_mask,
)
from bids_uad.preprocessing.registration import (
    Volume,
    coregister,
    register_to_anchor,
    register_to_reference,
    registration_metrics,
)
from bids_uad.preprocessing.resampling import (
    read_itk,
    resample,
    resample_mask,
    resample_mask_through,
    rotation_angle,
    write_itk,
)

EXTERNAL, BACKGROUND, EXTRACTED, ANCHOR = "given", "background", "extracted", "anchor"
ORIGINS = (EXTERNAL, BACKGROUND, EXTRACTED, ANCHOR)
"""Origins of brain masks; see `dataset.sidecars.QUALITY_COLUMNS`."""
_IMPLAUSIBLE_STRIPPED = "The image, which is marked or detected as skull-stripped,"


class _ConformInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="raw scan")


class _ConformOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="three-dimensional float32 scan on the same grid")
    warnings = traits.Dict(desc="warnings about the header, and whether each excludes the scan")


class Conform(SimpleInterface):
    """Check a scan and rewrite it as a three-dimensional float32 volume with equal sform and qform.

    Voxels keep their positions, also on oblique grids; software differs in which of the two forms it reads.
    """

    input_spec = _ConformInputSpec
    output_spec = _ConformOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = read_scan(self.inputs.in_file)
        self._results["out_file"] = _save(runtime, "conformed.nii.gz", scan.data, scan.affine, np.float32)
        self._results["warnings"] = header_warnings(self.inputs.in_file) | dict.fromkeys(scan.notes, False)
        return runtime


class _BrainMaskInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan")
    template = File(exists=True, mandatory=True, desc="skull-stripped reference image")
    template_mask = File(exists=True, mandatory=True, desc="its brain mask")
    skull_stripped = traits.Bool(desc="whether the scan is skull-stripped; detected if unset")
    external_mask = File(desc="brain mask of another pipeline on the grid of the scan")
    source = traits.Str(nohash=True, desc="original scan, for messages")
    program = traits.Enum(*EXTRACTIONS, mandatory=True, desc="brain-extraction method")
    weights = traits.Str(desc="weights of the network or program")


class _BrainMaskOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the scan")
    skull_stripped = traits.Bool(desc="whether the scan is skull-stripped")
    origin = traits.Enum(*ORIGINS, desc="origin of the mask")
    warnings = traits.Dict(desc="warnings about the mask, and whether each excludes the scan")


class BrainMask(SimpleInterface):
    """Mask the brain of an anchor: external mask, background of a skull-stripped scan, or brain extraction.

    The first of the three with a plausible brain volume is used. If the extracted one has none either, the
    scan is refused.
    """

    input_spec = _BrainMaskInputSpec
    output_spec = _BrainMaskOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = _volume(self.inputs.in_file)
        warnings: dict[str, bool] = {}
        mask = None
        if isdefined(self.inputs.external_mask):
            mask, origin = _on_grid_of(scan, self.inputs.external_mask), EXTERNAL
            if not has_brain_volume(mask, scan.affine):
                subject = f"The brain mask {Path(self.inputs.external_mask).name} of another pipeline"
                warnings[_replaced(subject, mask, scan)] = False
                mask = None
        stripped = _stripped(self.inputs.skull_stripped, scan)
        if stripped and mask is None:
            mask, origin = mask_from_background(scan.data), BACKGROUND
            if not has_brain_volume(mask, scan.affine):
                warnings[_replaced(_IMPLAUSIBLE_STRIPPED, mask, scan)] = False
                mask, stripped = None, False
        if mask is None:
            mask, origin = self._extract(scan, Path(runtime.cwd), warnings), EXTRACTED
            if not has_brain_volume(mask, scan.affine):
                raise InputError(
                    _source(self),
                    f"brain extraction failed: the mask has {_describe_volume(mask, scan)}",
                    "exclude the scan if it shows no whole brain, or provide its brain mask with -d",
                )
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, scan.affine, np.uint8)
        self._results |= {"skull_stripped": stripped, "origin": origin, "warnings": warnings}
        return runtime

    def _extract(self, scan: Volume, folder: Path, warnings: dict[str, bool]) -> np.ndarray:
        """Extract the brain of a whole head with the requested method."""
        if self.inputs.program in PROGRAMS:
            weights = Path(self.inputs.weights)
            path = run_external_program(self.inputs.program, weights, Path(self.inputs.in_file), folder)
            return _on_grid_of(scan, str(path))
        template = network_mask = None
        if self.inputs.program in (COMBINED, TEMPLATE):
            template = _volume(self.inputs.template, self.inputs.template_mask)
        if self.inputs.program in (COMBINED, NETWORK):
            # PyTorch is imported by the workers that need it alone.
            from bids_uad.preprocessing.brain_extraction.network import load_network, predict_brain_mask

            network = load_network(Path(self.inputs.weights))
            network_mask = predict_brain_mask(scan.data, scan.affine, network)
        mask, agreement = extract_brain(scan, template, folder, network_mask)
        if agreement is not None and agreement < MIN_AGREEMENT:
            text = (
                f"The brain masks of the template and the network differ (Dice {agreement:.2f}); that of the "
                "network was used: check the brain mask."
            )
            warnings[text] = False
        return mask


class _CorrectBiasInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan")
    mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    corrected = traits.Bool(False, usedefault=True, desc="whether the scan is bias-corrected already")


class _CorrectBiasOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="bias-corrected scan")
    out_brain = File(exists=True, desc="the same, 0 outside the mask")


class CorrectBias(SimpleInterface):
    """Correct the bias field with N4, estimated in the brain, unless the scan is corrected already."""

    input_spec = _CorrectBiasInputSpec
    output_spec = _CorrectBiasOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = _volume(self.inputs.in_file, self.inputs.mask)
        corrected = scan.data
        if not self.inputs.corrected:
            corrected = correct_bias(scan.data, scan.affine, scan.mask)
        self._results["out_file"] = _save(runtime, "corrected.nii.gz", corrected, scan.affine, np.float32)
        brain = np.where(scan.mask, corrected, 0.0)
        self._results["out_brain"] = _save(runtime, "brain.nii.gz", brain, scan.affine, np.float32)
        return runtime


class _RegisterToReferenceInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected brain of the anchor")
    mask = File(exists=True, mandatory=True, desc="its mask")
    reference = File(exists=True, mandatory=True, desc="reference image on the SRI24 grid")
    reference_mask = File(exists=True, mandatory=True, desc="its brain mask")
    external_xfm = File(desc="ITK transform from the scan to SRI24, of another pipeline")
    source = traits.Str(nohash=True, desc="original scan, for messages")
    asymmetric = traits.Bool(False, usedefault=True, desc="whether the reference is left-right asymmetric")
    dark_fluid = traits.Bool(False, usedefault=True, desc="whether the scan is a FLAIR")


class _RegisterToReferenceOutputSpec(TraitedSpec):
    to_sri24 = File(exists=True, desc="ITK transform from the scan to SRI24")
    from_sri24 = File(exists=True, desc="its inverse")
    qc = traits.Dict(desc="similarity, mask_overlap, restarted")


class RegisterToReference(SimpleInterface):
    """Register the anchor's brain rigidly (6 degrees of freedom) to the reference, or use its transform."""

    input_spec = _RegisterToReferenceInputSpec
    output_spec = _RegisterToReferenceOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        folder = Path(runtime.cwd)
        reference = _volume(self.inputs.reference, self.inputs.reference_mask)
        brain = _volume(self.inputs.in_file, self.inputs.mask)
        flair = self.inputs.dark_fluid
        if isdefined(self.inputs.external_xfm):
            pull = read_itk(self.inputs.external_xfm)
            qc = registration_metrics(reference, brain, pull, dark_fluid=flair)
        else:
            pull, qc = register_to_reference(
                reference, brain, asymmetric=self.inputs.asymmetric, dark_fluid=flair
            )
        _check_shows_brain(_source(self), qc, "the reference brain")
        self._results |= _write_both_directions(folder, pull)
        self._results["qc"] = qc
        return runtime


class _RegisterToAnchorInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed T2w or FLAIR scan, whole head or stripped")
    anchor = File(exists=True, mandatory=True, desc="bias-corrected brain of the anchor, in its native space")
    anchor_mask = File(exists=True, mandatory=True, desc="brain mask of the anchor")
    anchor_xfm = File(exists=True, mandatory=True, desc="ITK transform from the anchor to SRI24")
    source = traits.Str(nohash=True, desc="original scan, for messages")
    skull_stripped = traits.Bool(desc="whether the scan is skull-stripped; detected if unset")
    aligned = traits.Bool(False, usedefault=True, desc="whether the scan is aligned with the anchor already")
    measure_agreement = traits.Bool(True, usedefault=True, desc="whether to compute quality metrics")
    external_xfm = File(desc="ITK transform from the scan to SRI24, of another pipeline")
    dark_fluid = traits.Bool(False, usedefault=True, desc="whether the scan is a FLAIR")


class _RegisterToAnchorOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the scan")
    to_sri24 = File(exists=True, desc="one composed ITK transform, scan to SRI24")
    from_sri24 = File(exists=True, desc="its inverse")
    skull_stripped = traits.Bool(desc="whether the scan is skull-stripped")
    origin = traits.Enum(*ORIGINS, desc="origin of the mask")
    warnings = traits.Dict(desc="warnings about the mask, and whether each excludes the scan")
    qc = traits.Dict(desc="similarity, mask_overlap, restarted")


class RegisterToAnchor(SimpleInterface):
    """Register a scan rigidly to its T1w scan, and compose the result with the transform of the T1w scan."""

    input_spec = _RegisterToAnchorInputSpec
    output_spec = _RegisterToAnchorOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        folder = Path(runtime.cwd)
        scan = _volume(self.inputs.in_file)
        anchor = _volume(self.inputs.anchor, self.inputs.anchor_mask)
        stripped = _stripped(self.inputs.skull_stripped, scan)
        own_mask = mask_from_background(scan.data) if stripped else None
        warnings: dict[str, bool] = {}
        if own_mask is not None and not has_brain_volume(own_mask, scan.affine):
            text = _replaced(
                _IMPLAUSIBLE_STRIPPED, own_mask, scan, "only the T1w image's brain mask was used"
            )
            warnings[text] = False
            own_mask, stripped = None, False
        anchor_xfm = read_itk(self.inputs.anchor_xfm)
        moving = Volume(scan.data, scan.affine, own_mask)
        if self.inputs.aligned or isdefined(self.inputs.external_xfm):
            external = None if self.inputs.aligned else read_itk(self.inputs.external_xfm)
            pull = np.eye(4) if external is None else external @ np.linalg.inv(anchor_xfm)
            qc = registration_metrics(anchor, moving, pull, mirrored=True, dark_fluid=self.inputs.dark_fluid)
            _check_shows_brain(_source(self), qc, "its T1w image")
        elif self.inputs.measure_agreement:
            pull, qc = register_to_anchor(anchor, moving, dark_fluid=self.inputs.dark_fluid)
            _check_shows_brain(_source(self), qc, "its T1w image")
        else:
            pull, qc = coregister(anchor, moving), {}
        mask = resample_mask(anchor.mask, anchor.affine, scan.data.shape, scan.affine, np.linalg.inv(pull))
        if own_mask is not None:
            mask &= own_mask
        if not mask.any():
            raise InputError(
                _source(self),
                "the scan does not overlap its T1w scan",
                "check that both belong to one session",
            )
        to_sri24 = pull @ anchor_xfm
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, scan.affine, np.uint8)
        self._results |= _write_both_directions(folder, to_sri24)
        self._results |= {"skull_stripped": stripped, "origin": ANCHOR, "warnings": warnings, "qc": qc}
        return runtime


class _RelateToRawInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed image of another pipeline")
    mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform from it to SRI24")
    raw = File(mandatory=True, desc="raw scan of that image")
    from_raw = File(desc="ITK transform from the raw scan to it; registered if unset")


class _RelateToRawOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the raw scan")
    to_sri24 = File(exists=True, desc="ITK transform from the raw scan to SRI24")
    from_sri24 = File(exists=True, desc="its inverse")


class RegisterRaw(SimpleInterface):
    """Find the transform from the raw scan to SRI24 if another pipeline's image was registered to SRI24.

    It is needed for outputs on the grid of the raw scan. Without a transform between the two images they are
    registered rigidly.
    """

    input_spec = _RelateToRawInputSpec
    output_spec = _RelateToRawOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        folder = Path(runtime.cwd)
        scan, raw = _volume(self.inputs.in_file, self.inputs.mask), read_scan(self.inputs.raw)
        if isdefined(self.inputs.from_raw):
            pull = read_itk(self.inputs.from_raw)
        else:
            pull = coregister(scan, Volume(raw.data, raw.affine))
        to_sri24 = pull @ read_itk(self.inputs.to_sri24)
        mask = resample_mask(scan.mask, scan.affine, raw.data.shape, raw.affine, np.linalg.inv(pull))
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, raw.affine, np.uint8)
        self._results |= _write_both_directions(folder, to_sri24)
        return runtime


class _ResampleToSRI24InputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected scan, native")
    conformed = File(exists=True, mandatory=True, desc="the scan before correction")
    native_mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform to SRI24")
    skull_stripped = traits.Bool(mandatory=True, desc="whether voxels outside the native mask have no signal")
    brain_mask = File(exists=True, desc="brain mask of the anchor, used instead of the native one")
    brain_xfm = File(exists=True, desc="ITK transform of that mask to SRI24")
    spaces = traits.List(traits.Str, desc="spaces of templates, see --output-spaces")


class _ResampleToSRI24OutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="scan on the SRI24 grid, scaled in the brain and 0 outside")
    out_mask = File(
        exists=True, desc="brain mask on the SRI24 grid, within the field of view and where there is signal"
    )
    coverage = File(exists=True, desc="voxels of the SRI24 grid that the scan has data for")
    unscored = traits.Float(
        desc="fraction of the brain mask that is outside the field of view or has no signal"
    )
    in_templates = traits.List(File(exists=True), desc="scan and brain mask in each of `spaces`")


class ResampleToSRI24(SimpleInterface):
    """Interpolate the scan once, from its native grid to SRI24, and scale its intensities in the brain.

    The same is done for the spaces of templates, through one transform composed of that to SRI24 and the
    affine between the templates.
    """

    input_spec = _ResampleToSRI24InputSpec
    output_spec = _ResampleToSRI24OutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = _volume(self.inputs.in_file, self.inputs.native_mask)
        raw = _volume(self.inputs.conformed, self.inputs.native_mask)
        scaled, brain, anatomical, has_data = self._resample(scan, raw, (space.SHAPE, space.AFFINE))
        self._results["out_file"] = _save_sri24(runtime, "preproc.nii.gz", scaled, np.float32)
        self._results["out_mask"] = _save_sri24(runtime, "brain_mask.nii.gz", brain, np.uint8)
        self._results["unscored"] = 1.0 - float(brain.sum()) / max(int(anatomical.sum()), 1)
        self._results["coverage"] = _save_sri24(runtime, "coverage.nii.gz", has_data, np.uint8)
        if isdefined(self.inputs.spaces):
            del scaled, brain, anatomical, has_data
            self._results["in_templates"] = []
            for template in space.output_spaces(self.inputs.spaces):
                scaled, brain, *_ = self._resample(scan, raw, template.grid, space.icbm_to_sri24())
                for kind, data, dtype in (("preproc", scaled, np.float32), ("brain_mask", brain, np.uint8)):
                    image = make_image(data, template.grid[1], dtype, code=space.MNI_CODE)
                    path = save_image(image, Path(runtime.cwd) / f"{template.kind(kind)}.nii.gz")
                    self._results["in_templates"].append(str(path))
        return runtime

    def _resample(
        self, scan: Volume, raw: Volume, grid: Grid, to_sri24: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Resample to a grid whose points `to_sri24` maps to SRI24.

        Returns the scaled scan, the brain mask where there is data, the whole brain mask, and the coverage.
        """

        def pull_from(path: str) -> np.ndarray:
            return read_itk(path) if to_sri24 is None else read_itk(path) @ to_sri24

        pull = pull_from(self.inputs.to_sri24)
        has_data = coverage_mask(raw, self.inputs.skull_stripped, *grid, pull)
        anatomical = np.ones(grid[0], dtype=bool)
        if isdefined(self.inputs.brain_mask):
            other = _mask(self.inputs.brain_mask)
            anatomical &= resample_mask(other.data, other.affine, *grid, pull_from(self.inputs.brain_xfm))
        if self.inputs.skull_stripped or not isdefined(self.inputs.brain_mask):
            anatomical &= resample_mask(scan.mask, scan.affine, *grid, pull)
        brain = anatomical & has_data
        no_signal = no_signal_mask(raw)
        if no_signal.any():
            brain &= resample(no_signal, raw.affine, *grid, pull, order=0) < 0.5
        values = resample(scan.data, scan.affine, *grid, pull, region=brain)
        try:
            scaled = scale_intensity(values, brain)
        except ValueError as error:
            raise InputError(
                self.inputs.in_file, str(error), "check the scan and its registration"
            ) from error
        return scaled, brain, anatomical, has_data


class _ResampleLesionInputSpec(BaseInterfaceInputSpec):
    in_file = File(desc="lesion mask; if unset, there is no output")
    xfm = File(desc="ITK transform from its space to that of the scan, if they differ")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform from the scan to SRI24")


class _ResampleLesionOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="lesion mask on the SRI24 grid")


class ResampleLesion(SimpleInterface):
    """Resample a manual lesion mask to SRI24 in one interpolation; any non-zero label is lesion."""

    input_spec = _ResampleLesionInputSpec
    output_spec = _ResampleLesionOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        if isdefined(self.inputs.in_file):
            lesion = Volume(*read_lesion(self.inputs.in_file))
            grid = (space.SHAPE, space.AFFINE)
            if isdefined(self.inputs.xfm):
                chain = [self.inputs.to_sri24, self.inputs.xfm]
                moved = resample_mask_through(lesion.data, lesion.affine, *grid, chain)
            else:
                moved = resample_mask(lesion.data, lesion.affine, *grid, read_itk(self.inputs.to_sri24))
            self._results["out_file"] = _save_sri24(runtime, "lesion_mask.nii.gz", moved, np.uint8)
        return runtime


class _AssessQualityInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected scan, native")
    modality = traits.Enum(*MODALITIES, mandatory=True)
    registration = traits.Dict(mandatory=True, desc="quality metrics of the registration")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform to SRI24")
    skull_stripped = traits.Bool(mandatory=True)
    mask_origin = traits.Enum(*ORIGINS, mandatory=True, desc="origin of the brain mask")
    brain_mask = File(exists=True, mandatory=True, desc="brain mask on the SRI24 grid")
    native_mask = File(exists=True, mandatory=True, desc="brain mask on the native grid")
    reference_mask = File(exists=True, mandatory=True, desc="brain mask of the reference")
    coverage = File(exists=True, mandatory=True, desc="voxels of the SRI24 grid that the scan has data for")
    unscored = traits.Float(mandatory=True, desc="fraction of the brain mask that is not scored")
    lesion = File(exists=True, desc="lesion mask on the SRI24 grid")
    header_warnings = traits.Dict(desc="warnings about the header, and whether each excludes the scan")
    mask_warnings = traits.Dict(desc="warnings about the brain mask, and whether each excludes the scan")


class _AssessQualityOutputSpec(TraitedSpec):
    qc = traits.Dict(desc="quality metrics and warnings")


class AssessQuality(SimpleInterface):
    """Collect the quality metrics of one scan, and derive warnings and failures."""

    input_spec = _AssessQualityInputSpec
    output_spec = _AssessQualityOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        native = _volume(self.inputs.in_file, self.inputs.native_mask)
        stripped = self.inputs.skull_stripped
        air = np.zeros_like(native.mask) if stripped else air_mask(native)
        voxel = float(abs(np.linalg.det(native.affine[:3, :3])))
        self._results["qc"] = assess_quality(
            registration=self.inputs.registration,
            skull_stripped=stripped,
            mask_origin=self.inputs.mask_origin,
            rotation=rotation_angle(read_itk(self.inputs.to_sri24)),
            brain=_mask(self.inputs.brain_mask).data,
            native_volume_mm3=float(native.mask.sum()) * voxel,
            reference=_mask(self.inputs.reference_mask).data,
            covered=_mask(self.inputs.coverage).data,
            unscored=self.inputs.unscored,
            lesion=_mask(self.inputs.lesion).data if isdefined(self.inputs.lesion) else None,
            warnings=(self.inputs.header_warnings or {}) | (self.inputs.mask_warnings or {}),
            image=image_quality_metrics(native.data, native.mask, air, self.inputs.modality),
        )
        return runtime


def _volume(path: str, mask: str | None = None) -> Volume:
    data, affine = read_volume(path)
    return Volume(data, affine, None if mask is None else read_volume(mask)[0] > 0.5)


def _mask(path: str) -> Volume:
    data, affine = read_volume(path)
    return Volume(data > 0, affine)


def _write_both_directions(folder: Path, to_sri24: np.ndarray) -> dict[str, str]:
    """Write a transform to SRI24 and its inverse; return the files by output field."""
    transforms = {"to_sri24": to_sri24, "from_sri24": np.linalg.inv(to_sri24)}
    return {name: str(write_itk(folder / f"{name}.txt", pull)) for name, pull in transforms.items()}


def _on_grid_of(scan: Volume, mask: str) -> np.ndarray:
    """Read a mask and reorder its voxels to the grid of a scan."""
    data, affine = read_volume(mask)
    return resample(data > 0, affine, scan.data.shape, scan.affine, order=0) > 0


def _source(interface: SimpleInterface) -> str:
    """Return the path of the original scan of an interface, for messages."""
    source = interface.inputs.source
    return str(source) if isdefined(source) else str(interface.inputs.in_file)


def _check_shows_brain(source: str, qc: dict[str, Any], other: str) -> None:
    """Check that a scan shows a brain.

    Raises
    ------
    InputError
        If its local correlation with the registration target is lower than that of brains.
    """
    correlation = abs(qc["local_correlation"])
    if correlation < MIN_LOCAL_CORRELATION:
        raise InputError(
            source,
            f"shows no brain: its local correlation with {other} is {correlation:.2f} (brains: at least "
            f"{MIN_LOCAL_CORRELATION:.2f})",
            "exclude the scan if it shows something else, such as a phantom; otherwise check its orientation",
        )


def _describe_volume(mask: np.ndarray, scan: Volume) -> str:
    low, high = BRAIN_VOLUME_RANGE_ML
    return f"{mask_volume(mask, scan.affine):,.0f} mL (brains: {low:,.0f} to {high:,.0f} mL)"


def _replaced(
    subject: str, mask: np.ndarray, scan: Volume, action: str = "another brain mask was computed"
) -> str:
    """Return the warning that a mask was replaced because of its volume."""
    return f"{subject} has {_describe_volume(mask, scan)}: {action}; check the brain mask."


def _stripped(value: Any, scan: Volume) -> bool:
    return bool(value) if isdefined(value) else is_skull_stripped(scan.data, scan.affine)


def _save(runtime: Any, name: str, data: np.ndarray, affine: np.ndarray, dtype: type) -> str:
    return str(save_image(make_image(data, affine, dtype), Path(runtime.cwd) / name))


def _save_sri24(runtime: Any, name: str, data: np.ndarray, dtype: type) -> str:
    return str(save_image(space.to_image(data, dtype), Path(runtime.cwd) / name))
