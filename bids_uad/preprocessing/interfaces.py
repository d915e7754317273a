"""nipype interfaces of the workflow: files in, files out; the work is done by the modules beside this one.

Inputs that users give are declared without ``exists=True``: nipype drops the path of a file that has
vanished, and then asks for a value. Read here, the error names the file.
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
from bids_uad.config import EXTRACTIONS
from bids_uad.errors import InputError
from bids_uad.images import make_image, save_image, scale_intensity
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
from bids_uad.preprocessing.brain_extraction.network import load_network, predict_brain_mask
from bids_uad.preprocessing.check import (
    header_warnings,
    is_skull_stripped,
    read_lesion,
    read_scan,
    read_volume,
)
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.quality import (
    LEAST_LOCAL_CORRELATION,
    assess_quality,
    coverage_mask,
    image_quality_metrics,
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
"""Where a brain mask comes from; see `dataset.sidecars.QUALITY_COLUMNS`."""


class _ConformInputSpec(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="raw scan")


class _ConformOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="three-dimensional float32 scan on the same grid")
    warnings = traits.Dict(desc="warnings about the header, and whether they are grave")


class Conform(SimpleInterface):
    """Check a scan and rewrite it as a three-dimensional float32 volume with one orientation, not two.

    The voxels stay where they are, oblique or not; sform and qform are made equal, since programs differ in
    which of the two they read.
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
    skull_stripped = traits.Bool(desc="whether the scan is skull-stripped; detected if not given")
    external_mask = File(desc="brain mask on the grid of the scan, from elsewhere")
    source = traits.Str(nohash=True, desc="scan that `in_file` was made of, for messages")
    program = traits.Enum(*EXTRACTIONS, mandatory=True, desc="what extracts the brain")
    weights = traits.Str(desc="weights of the network or program")


class _BrainMaskOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the scan")
    skull_stripped = traits.Bool(desc="what was found")
    origin = traits.Enum(*ORIGINS, desc="where the mask comes from")
    warnings = traits.Dict(desc="warnings about the mask, and whether they are grave")


class BrainMask(SimpleInterface):
    """Mask the brain of an anchor: as given, its background if it is skull-stripped, or extracted.

    A mask whose volume is not that of a brain is not used: the next of the three is. If the volume of the
    extracted one is not either, the scan is refused.
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
                said = f"The brain mask {Path(self.inputs.external_mask).name} of another pipeline"
                warnings[_replaced(said, mask, scan)] = False
                mask = None
        stripped = _stripped(self.inputs.skull_stripped, scan)
        if stripped and mask is None:
            mask, origin = mask_from_background(scan.data), BACKGROUND
            if not has_brain_volume(mask, scan.affine):
                warnings[_replaced(_STATED, mask, scan)] = False
                mask, stripped = None, False
        if mask is None:
            mask, origin = self._extract(scan, Path(runtime.cwd), warnings), EXTRACTED
            if not has_brain_volume(mask, scan.affine):
                raise InputError(
                    _source(self),
                    f"no brain was found: the brain extraction gave {_millilitres(mask, scan)}",
                    "exclude the scan if it shows no whole brain, or give its brain mask with -d",
                )
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, scan.affine, np.uint8)
        self._results |= {"skull_stripped": stripped, "origin": origin, "warnings": warnings}
        return runtime

    def _extract(self, scan: Volume, folder: Path, warnings: dict[str, bool]) -> np.ndarray:
        """Find the brain as in a whole head, with the program that was asked for."""
        if self.inputs.program in PROGRAMS:
            weights = Path(self.inputs.weights)
            found = run_external_program(self.inputs.program, weights, Path(self.inputs.in_file), folder)
            return _on_grid_of(scan, str(found))
        template = seen = None
        if self.inputs.program in (COMBINED, TEMPLATE):
            template = _volume(self.inputs.template, self.inputs.template_mask)
        if self.inputs.program in (COMBINED, NETWORK):
            seen = predict_brain_mask(scan.data, scan.affine, load_network(Path(self.inputs.weights)))
        mask, agreement = extract_brain(scan, template, folder, seen)
        if agreement is not None and agreement < MIN_AGREEMENT:
            text = (
                f"The template and the network disagree about the brain (Dice {agreement:.2f}); the "
                "network was believed: check the brain mask."
            )
            warnings[text] = False
        return mask


class _CorrectBiasInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan")
    mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    corrected = traits.Bool(False, usedefault=True, desc="whether another pipeline has done so already")


class _CorrectBiasOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="bias-corrected scan")
    out_brain = File(exists=True, desc="the same, 0 outside the mask")


class CorrectBias(SimpleInterface):
    """Correct the bias field with N4, estimated in the brain, unless that is done."""

    input_spec = _CorrectBiasInputSpec
    output_spec = _CorrectBiasOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = _volume(self.inputs.in_file, self.inputs.mask)
        done = self.inputs.corrected
        corrected = scan.data if done else correct_bias(scan.data, scan.affine, scan.mask)
        self._results["out_file"] = _save(runtime, "corrected.nii.gz", corrected, scan.affine, np.float32)
        brain = np.where(scan.mask, corrected, 0.0)
        self._results["out_brain"] = _save(runtime, "brain.nii.gz", brain, scan.affine, np.float32)
        return runtime


class _RegisterToReferenceInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected brain of the anchor")
    mask = File(exists=True, mandatory=True, desc="its mask")
    reference = File(exists=True, mandatory=True, desc="reference image on the SRI24 grid")
    reference_mask = File(exists=True, mandatory=True, desc="its brain mask")
    external_xfm = File(desc="ITK transform that resamples the scan to SRI24, from elsewhere")
    source = traits.Str(nohash=True, desc="scan that `in_file` was made of, for messages")
    asymmetric = traits.Bool(False, usedefault=True, desc="whether the reference has a left and a right")


class _RegisterToReferenceOutputSpec(TraitedSpec):
    to_sri24 = File(exists=True, desc="ITK transform that resamples the scan on the SRI24 grid")
    from_sri24 = File(exists=True, desc="its inverse")
    qc = traits.Dict(desc="similarity, mask_overlap, restarted")


class RegisterToReference(SimpleInterface):
    """Register the anchor's brain rigidly (6 degrees of freedom) to the reference, unless that is done."""

    input_spec = _RegisterToReferenceInputSpec
    output_spec = _RegisterToReferenceOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        folder = Path(runtime.cwd)
        reference = _volume(self.inputs.reference, self.inputs.reference_mask)
        brain = _volume(self.inputs.in_file, self.inputs.mask)
        if isdefined(self.inputs.external_xfm):
            pull = read_itk(self.inputs.external_xfm)
            qc = registration_metrics(reference, brain, pull)
        else:
            sided = self.inputs.asymmetric
            pull, qc = register_to_reference(reference, brain, folder, asymmetric=sided)
        _refuse_other_objects(_source(self), qc, "the reference brain")
        self._results |= _both_ways(folder, pull)
        self._results["qc"] = qc
        return runtime


class _RegisterToAnchorInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed T2w scan, whole head or stripped")
    anchor = File(exists=True, mandatory=True, desc="bias-corrected brain of the anchor, in its native space")
    anchor_mask = File(exists=True, mandatory=True, desc="brain mask of the anchor")
    anchor_xfm = File(exists=True, mandatory=True, desc="ITK transform that resamples the anchor to SRI24")
    source = traits.Str(nohash=True, desc="scan that `in_file` was made of, for messages")
    skull_stripped = traits.Bool(desc="whether the T2w scan is skull-stripped; detected if not given")
    aligned = traits.Bool(False, usedefault=True, desc="whether it lies on the anchor already")
    measure_agreement = traits.Bool(
        True, usedefault=True, desc="whether the agreement of the two is measured"
    )
    external_xfm = File(desc="ITK transform that resamples the scan to SRI24, from elsewhere")


class _RegisterToAnchorOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the T2w scan")
    to_sri24 = File(exists=True, desc="one composed ITK transform, T2w scan to SRI24")
    from_sri24 = File(exists=True, desc="its inverse")
    skull_stripped = traits.Bool(desc="what was found")
    origin = traits.Enum(*ORIGINS, desc="where the mask comes from")
    warnings = traits.Dict(desc="warnings about the mask, and whether they are grave")
    qc = traits.Dict(desc="similarity, mask_overlap, restarted")


class RegisterToAnchor(SimpleInterface):
    """Register a T2w scan rigidly to its T1w scan and chain the result with the T1w's way to SRI24."""

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
            warnings[
                _replaced(_STATED, own_mask, scan, "the brain mask of the T1w image was taken alone")
            ] = False
            own_mask, stripped = None, False
        anchor_xfm = read_itk(self.inputs.anchor_xfm)
        moving = Volume(scan.data, scan.affine, own_mask)
        if self.inputs.aligned or isdefined(self.inputs.external_xfm):
            external = None if self.inputs.aligned else read_itk(self.inputs.external_xfm)
            pull = np.eye(4) if external is None else external @ np.linalg.inv(anchor_xfm)
            qc = registration_metrics(anchor, moving, pull, folder)
            _refuse_other_objects(_source(self), qc, "its T1w image")
        elif self.inputs.measure_agreement:
            pull, qc = register_to_anchor(anchor, moving, folder)
            _refuse_other_objects(_source(self), qc, "its T1w image")
        else:
            pull, qc = coregister(anchor, moving, folder), {}
        mask = resample_mask(anchor.mask, anchor.affine, scan.data.shape, scan.affine, np.linalg.inv(pull))
        if own_mask is not None:
            mask &= own_mask
        if not mask.any():
            raise InputError(
                _source(self),
                "the scan does not overlap its T1w scan",
                "check that both show one session",
            )
        to_sri24 = pull @ anchor_xfm
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, scan.affine, np.uint8)
        self._results |= _both_ways(folder, to_sri24)
        self._results |= {"skull_stripped": stripped, "origin": ANCHOR, "warnings": warnings, "qc": qc}
        return runtime


class _RelateToRawInputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan that another pipeline has made")
    mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform that resamples it on the SRI24 grid")
    raw = File(mandatory=True, desc="raw scan it was made of")
    from_raw = File(desc="ITK transform that resamples the raw scan on it; found if not given")


class _RelateToRawOutputSpec(TraitedSpec):
    out_mask = File(exists=True, desc="brain mask on the grid of the raw scan")
    to_sri24 = File(exists=True, desc="ITK transform that resamples the raw scan on the SRI24 grid")
    from_sri24 = File(exists=True, desc="its inverse")


class RegisterRaw(SimpleInterface):
    """Find the way from SRI24 to the raw scan, where another pipeline's image is what was registered.

    Results go back to the raw scan's grid. The two images show the same head; without a transform they are
    registered rigidly, starting from the same place.
    """

    input_spec = _RelateToRawInputSpec
    output_spec = _RelateToRawOutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        folder = Path(runtime.cwd)
        scan, raw = _volume(self.inputs.in_file, self.inputs.mask), read_scan(self.inputs.raw)
        if isdefined(self.inputs.from_raw):
            pull = read_itk(self.inputs.from_raw)
        else:
            pull = coregister(scan, Volume(raw.data, raw.affine), folder)
        to_sri24 = pull @ read_itk(self.inputs.to_sri24)
        mask = resample_mask(scan.mask, scan.affine, raw.data.shape, raw.affine, np.linalg.inv(pull))
        self._results["out_mask"] = _save(runtime, "brain_mask.nii.gz", mask, raw.affine, np.uint8)
        self._results |= _both_ways(folder, to_sri24)
        return runtime


class _ResampleToSRI24InputSpec(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected scan, native")
    conformed = File(exists=True, mandatory=True, desc="the same before correction")
    native_mask = File(exists=True, mandatory=True, desc="brain mask on its grid")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform to SRI24")
    skull_stripped = traits.Bool(
        mandatory=True, desc="whether voxels outside the native mask carry no signal"
    )
    brain_mask = File(exists=True, desc="brain mask to bring along instead of the native one (the anchor's)")
    brain_xfm = File(exists=True, desc="ITK transform of that mask to SRI24")


class _ResampleToSRI24OutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="scan on the SRI24 grid, scaled in the brain and 0 outside")
    out_mask = File(exists=True, desc="brain mask on the SRI24 grid, within the field of view")
    coverage = File(exists=True, desc="voxels of the SRI24 grid that the scan has data for")


class ResampleToSRI24(SimpleInterface):
    """Interpolate the scan once, from its native grid to SRI24, and scale its intensities in the brain."""

    input_spec = _ResampleToSRI24InputSpec
    output_spec = _ResampleToSRI24OutputSpec

    def _run_interface(self, runtime: Any) -> Any:
        scan = _volume(self.inputs.in_file, self.inputs.native_mask)
        pull = read_itk(self.inputs.to_sri24)
        grid = (space.SHAPE, space.AFFINE)
        has_data = coverage_mask(_volume(self.inputs.conformed), self.inputs.skull_stripped, *grid, pull)
        brain = has_data.copy()
        if isdefined(self.inputs.brain_mask):
            other = _mask(self.inputs.brain_mask)
            brain &= resample_mask(other.data, other.affine, *grid, read_itk(self.inputs.brain_xfm))
            if self.inputs.skull_stripped:
                brain &= resample_mask(scan.mask, scan.affine, *grid, pull)
        else:
            brain &= resample_mask(scan.mask, scan.affine, *grid, pull)
        values = resample(scan.data, scan.affine, *grid, pull)
        try:
            scaled = scale_intensity(values, brain)
        except ValueError as error:
            raise InputError(
                self.inputs.in_file, str(error), "check the scan and its registration"
            ) from error
        self._results["out_file"] = _save_sri24(runtime, "preproc.nii.gz", scaled, np.float32)
        self._results["out_mask"] = _save_sri24(runtime, "brain_mask.nii.gz", brain, np.uint8)
        self._results["coverage"] = _save_sri24(runtime, "coverage.nii.gz", has_data, np.uint8)
        return runtime


class _ResampleLesionInputSpec(BaseInterfaceInputSpec):
    in_file = File(desc="lesion mask; without one nothing is done")
    xfm = File(desc="ITK transform that resamples its space to the scan's, if they differ")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform that resamples the scan to SRI24")


class _ResampleLesionOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="lesion mask on the SRI24 grid")


class ResampleLesion(SimpleInterface):
    """Bring a manual lesion mask to SRI24 in one interpolation, if there is one.

    Any non-zero label is lesion.
    """

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
    modality = traits.Enum("T1w", "T2w", mandatory=True)
    registration = traits.Dict(mandatory=True, desc="figures of the registration")
    to_sri24 = File(exists=True, mandatory=True, desc="ITK transform to SRI24")
    skull_stripped = traits.Bool(mandatory=True)
    mask_origin = traits.Enum(*ORIGINS, mandatory=True, desc="where the brain mask comes from")
    brain_mask = File(exists=True, mandatory=True, desc="brain mask on the SRI24 grid")
    native_mask = File(exists=True, mandatory=True, desc="brain mask on the native grid")
    reference_mask = File(exists=True, mandatory=True, desc="brain mask of the reference")
    coverage = File(exists=True, mandatory=True, desc="voxels of the SRI24 grid that the scan has data for")
    lesion = File(exists=True, desc="lesion mask on the SRI24 grid")
    header_warnings = traits.Dict(desc="warnings about the header, and whether each excludes the scan")
    mask_warnings = traits.Dict(desc="warnings about the brain mask, and whether each excludes the scan")


class _AssessQualityOutputSpec(TraitedSpec):
    qc = traits.Dict(desc="figures and warnings for the report")


class AssessQuality(SimpleInterface):
    """Collect the quality figures of one scan and put warnings into words."""

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


def _both_ways(folder: Path, to_sri24: np.ndarray) -> dict[str, str]:
    """Write a transform to SRI24 and its inverse; give the files by output field."""
    ways = {"to_sri24": to_sri24, "from_sri24": np.linalg.inv(to_sri24)}
    return {name: str(write_itk(folder / f"{name}.txt", pull)) for name, pull in ways.items()}


def _on_grid_of(scan: Volume, mask: str) -> np.ndarray:
    """Read a mask on the grid of a scan, whatever order its voxels are stored in."""
    data, affine = read_volume(mask)
    return resample(data > 0, affine, scan.data.shape, scan.affine, order=0) > 0


def _source(interface: SimpleInterface) -> str:
    """Name the scan that an interface works on as the user knows it."""
    source = interface.inputs.source
    return str(source) if isdefined(source) else str(interface.inputs.in_file)


def _refuse_other_objects(source: str, qc: dict[str, Any], other: str) -> None:
    """Refuse a scan that shows something other than a brain.

    Raises
    ------
    InputError
        If it has less in common with what it was registered to than brains have.
    """
    found = abs(qc["local_correlation"])
    if found < LEAST_LOCAL_CORRELATION:
        raise InputError(
            source,
            f"shows no brain: it has nothing in common with {other} (local correlation {found:.2f}; that of "
            f"brains is at least {LEAST_LOCAL_CORRELATION:.2f})",
            "exclude the scan if it shows something else, such as a phantom; else check its orientation",
        )


def _millilitres(mask: np.ndarray, scan: Volume) -> str:
    low, high = BRAIN_VOLUME_RANGE_ML
    return f"{mask_volume(mask, scan.affine):,.0f} mL, and brains hold {low:,.0f} to {high:,.0f} mL"


def _replaced(subject: str, mask: np.ndarray, scan: Volume, by: str = "the brain mask was made anew") -> str:
    """Say that a mask was replaced, and why."""
    return f"{subject} holds {_millilitres(mask, scan)}: {by}; check the brain mask."


_STATED = "The image, which is stated or appears to be skull-stripped,"


def _stripped(stated: Any, scan: Volume) -> bool:
    return bool(stated) if isdefined(stated) else is_skull_stripped(scan.data, scan.affine)


def _save(runtime: Any, name: str, data: np.ndarray, affine: np.ndarray, dtype: type) -> str:
    return str(save_image(make_image(data, affine, dtype), Path(runtime.cwd) / name))


def _save_sri24(runtime: Any, name: str, data: np.ndarray, dtype: type) -> str:
    return str(save_image(space.to_image(data, dtype), Path(runtime.cwd) / name))
