"""Plan of a participant: checked images, what is missing or outdated of each, locks, outdated outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bids_uad.config import MODALITIES, RunConfig
from bids_uad.dataset.inputs import Collection, collect
from bids_uad.dataset.lesion_masks import LesionMask
from bids_uad.dataset.naming import (
    PREFIX_ENTITIES,
    ImageUnit,
    Problem,
    detection_outputs,
    entities_of,
    template_outputs,
)
from bids_uad.dataset.participants import Participants, Person
from bids_uad.engine.bundle import Bundle
from bids_uad.errors import InputError, truncate_list
from bids_uad.files import NameLocks, remove_unfinished, sha256_of
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    all_exist,
    make_fingerprint,
    read_record,
    record_path,
    withdraw_outputs,
)
from bids_uad.levels.participant.leakage import Remark
from bids_uad.methods.registry import cpu_precision
from bids_uad.preprocessing.brain_extraction.masks import Extraction
from bids_uad.preprocessing.check import check_image
from bids_uad.preprocessing.reference import Reference
from bids_uad.space import output_spaces

MAX_DETECTION_THREADS = 4
"""Maximum number of CPU threads of one detector, unless `omp_nthreads` is higher."""


@dataclass(frozen=True)
class RunContext:
    """Options and resources of a run, the same for all images.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.
    bundles : tuple of Bundle
        Models, one entry per deviation.
    reference : Reference
        Reference image in SRI24 space.
    extraction : Extraction
        Method of brain extraction.
    device : str
        `cpu`, `cuda`, `cuda:N` or `mps`; that of `config` before the device is resolved.
    precision : str
        `fp32` or `bf16`, or on a CPU `auto`; that of `config` before the device is resolved.
    """

    config: RunConfig
    bundles: tuple[Bundle, ...]
    reference: Reference
    extraction: Extraction
    device: str
    precision: str

    @property
    def detection_threads(self) -> int:
        """CPU threads of a detector; they depend on options only, so that results are reproducible."""
        if self.device != "cpu":
            return 1
        return max(self.config.omp_nthreads, min(self.config.nprocs, MAX_DETECTION_THREADS))

    def precision_of(self, bundle: Bundle) -> str:
        """Return `fp32` or `bf16`, in which the networks of a model are evaluated."""
        if self.config.precision == "auto" and bundle.protocol.published:
            return "fp32"
        return cpu_precision(bundle.detector) if self.precision == "auto" else self.precision


@dataclass(frozen=True)
class Task:
    """An image, and which of its outputs are missing or outdated.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    bundles : tuple of Bundle
        Models whose outputs are missing, one entry per deviation.
    person : Person
        Age, sex, health and scanner of the participant at the image's session.
    lesion : LesionMask, optional
        Ground truth of the image; images of a session may share it.
    fingerprint : dict
        Inputs and options that the outputs depend on, except the models.
    outdated : bool
        Whether inputs or options have changed since the outputs were written.
    outdated_models : tuple of str
        Labels of models with outdated outputs that are not among the models of this run.
    done : bool
        Whether all outputs exist and are up to date.
    preprocessed : tuple of str, default=()
        Outputs of preprocessing, relative to the dataset, if all exist and are up to date.
    anchor_only : bool, default=False
        Whether the image is used only to register T2w images of other sessions. It is not written, and
        counts as done.
    """

    unit: ImageUnit
    bundles: tuple[Bundle, ...]
    person: Person
    lesion: LesionMask | None
    fingerprint: dict
    outdated: bool
    outdated_models: tuple[str, ...]
    done: bool
    preprocessed: tuple[str, ...] = ()
    anchor_only: bool = False

    @property
    def provides_lesion(self) -> bool:
        """Whether the lesion mask is transformed to SRI24 by the workflow of this image."""
        return self.lesion_provider == self.unit.key

    @property
    def is_control(self) -> bool:
        """Whether the participant is a healthy control in participants.tsv, at the image's session."""
        return bool(self.person.healthy)

    @property
    def lesion_provider(self) -> str | None:
        """Name of the image whose workflow transforms the lesion mask; None without ground truth."""
        return None if self.lesion is None else self.lesion.provider

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Names of other images whose brain mask or registration the outputs depend on."""
        anchor = None if self.unit.anchor is None else self.unit.anchor.key
        lesion = None if self.lesion is None or self.lesion.on_atlas else self.lesion.provider
        return tuple(dict.fromkeys(name for name in (anchor, lesion) if name not in (None, self.unit.key)))


def plan_tasks(collection: Collection, participants: Participants, context: RunContext) -> list[Task]:
    """Compare every image with its completion record.

    Parameters
    ----------
    collection : Collection
        Images of the run, lesion masks, and images that are anchors only.
    participants : Participants
        Age, sex, health and scanner.
    context : RunContext
        Options, models, reference image and brain extraction.

    Returns
    -------
    list of Task
        One per image, in the order of `collection.units`.
    """
    tasks = []
    for unit in collection.units:
        if unit.key in collection.anchors_only:
            tasks.append(Task(unit, (), Person(), None, {}, False, (), done=True, anchor_only=True))
        else:
            person = participants.person(f"sub-{unit.subject}", unit.session)
            tasks.append(_plan_task(unit, person, collection.lesions.get(unit.key), context))
    return tasks


def _plan_task(unit: ImageUnit, person: Person, lesion: LesionMask | None, context: RunContext) -> Task:
    """Compare one image with its completion record."""
    config = context.config
    fingerprint = make_fingerprint(
        unit,
        lesion,
        reference_sha256=context.reference.sha256,
        extraction=context.extraction,
    )
    record = read_record(record_path(config.output_dir, unit))
    outdated = record is not None and record.fingerprint != fingerprint
    current = None if outdated else record
    requested = [
        bundle
        for bundle in context.bundles
        if bundle.modality == unit.modality and unit.modality in config.modalities
    ]
    spaces = output_spaces(config.output_spaces)
    missing = tuple(
        bundle
        for bundle in requested
        if not _is_current(
            current,
            bundle,
            model_identity(bundle, config, person),
            config.output_dir,
            detection_outputs(unit, bundle.scored_as, spaces=spaces) if spaces else {},
        )
    )
    names = {bundle.scored_as for bundle in requested}
    earlier = record.models if outdated else {}
    preprocessed = (
        current is not None
        and all_exist(current.outputs, config.output_dir)
        and _lists(current.outputs, template_outputs(unit, spaces))
    )
    return Task(
        unit=unit,
        bundles=missing,
        person=person,
        lesion=lesion,
        fingerprint=fingerprint,
        outdated=outdated,
        outdated_models=tuple(model.label for name, model in earlier.items() if name not in names),
        done=preprocessed and not missing,
        preprocessed=tuple(current.outputs) if preprocessed else (),
    )


def _is_current(
    record: CompletionRecord | None,
    bundle: Bundle,
    identity: str,
    output_dir: Path,
    files: Mapping[str, Path],
) -> bool:
    """Return whether all outputs of exactly this model exist, `files` among them."""
    model = None if record is None else record.models.get(bundle.scored_as)
    return (
        model is not None
        and model.identity == identity
        and all_exist(model.outputs, output_dir)
        and _lists(model.outputs, files)
    )


def _lists(recorded: Sequence[str], files: Mapping[str, Path]) -> bool:
    """Return whether all files are among the recorded ones, which may be of a run with other spaces."""
    return {path.as_posix() for path in files.values()} <= set(recorded)


def model_identity(bundle: Bundle, config: RunConfig, person: Person) -> str:
    """Return a text that identifies what the outputs of a model depend on.

    These are training, calibration, the requested precision (`auto` is not resolved, so that a run may
    continue on other hardware), the random seed, the minimum volumes, and for deviations also age and sex.

    Parameters
    ----------
    bundle : Bundle
        The model.
    config : RunConfig
        `precision`, `random_seed`, `min_lesion_size` and `min_counted_volume` are used.
    person : Person
        Age and sex of the participant.

    Returns
    -------
    str
        Checksums and values, joined by `+`.
    """
    identity = (
        f"{bundle.sha256}+{bundle.calibration_sha256}+{config.precision}+seed {config.random_seed}"
        f"+{config.min_counted_volume:g}mm3"
    )
    if config.min_lesion_size is not None:
        identity += f"+components of {config.min_lesion_size:g}mm3"
    if bundle.deviation == "none":
        return identity
    return f"{identity}+{person.covariates['age']}+{person.covariates['sex']}"


def split_tasks(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Return the pending tasks of a participant, and those that are preprocessed for them.

    A pending image is preprocessed unless the outputs of preprocessing exist, for example because only a
    model is new. Any image is preprocessed (from the working folder, if it still exists) if an image that is
    preprocessed is registered to it, or needs the lesion mask on its grid.

    Parameters
    ----------
    tasks : sequence of Task
        All tasks of the participant.

    Returns
    -------
    to_do : list of Task
        Tasks with missing outputs.
    to_preprocess : list of Task
        Tasks whose images are preprocessed.
    """
    to_do = [task for task in tasks if not task.done]
    by_key = {task.unit.key: task for task in tasks}
    keys = {task.unit.key for task in to_do if not task.preprocessed}
    for _ in range(2):  # a lesion mask may belong to an image that is itself registered to another
        keys = keys.union(*(_needs(by_key[key]) for key in keys))
    return to_do, [task for task in tasks if task.unit.key in keys]


def _needs(task: Task) -> set[str]:
    """Return the names of the images whose workflows are connected to that of a task."""
    needs = set() if task.unit.anchor is None else {task.unit.anchor.key}
    if task.lesion_provider not in (None, task.unit.key):
        needs.add(task.lesion_provider)
    return needs


def inspect_participant(config: RunConfig, subject: str) -> tuple[Collection, dict[Path, str]]:
    """Find, read and hash the inputs of one participant; run in a worker process.

    Parameters
    ----------
    config : RunConfig
        Options of the command line.
    subject : str
        Label without `sub-`.

    Returns
    -------
    collection : Collection
        Usable images, and problems of the others.
    checksums : dict of pathlib.Path to str
        SHA-256 of the images and of the files that belong to them.

    Raises
    ------
    ConfigError
        If the filter file is not valid.
    """
    collection = collect(config, partial(_check_image, config), [subject])
    by_key = {unit.key: unit for unit in collection.units}
    units, problems, used = [], [], set()
    for unit in collection.units:
        files = _files_of(unit, collection.lesions.get(unit.key), by_key)
        try:
            for path in files:
                sha256_of(path)
        except InputError as error:
            problems.append(Problem(unit.subject, str(error), unit.key))
        else:
            units.append(unit)
            used |= files
    collection = replace(collection, units=tuple(units), problems=(*collection.problems, *problems))
    return collection, {path: sha256_of(path) for path in used}


def _check_image(config: RunConfig, unit: ImageUnit) -> None:
    """Check an image, unless an earlier run has processed the same file."""
    record = read_record(record_path(config.output_dir, unit))
    if (
        record is None
        or not unit.path.is_file()
        or record.fingerprint.get("input_sha256") != sha256_of(unit.path)
    ):
        check_image(unit.path)


def _files_of(unit: ImageUnit, lesion: LesionMask | None, by_key: Mapping[str, ImageUnit]) -> set[Path]:
    """Return the input files of an image, also those of other images that it needs."""
    needed = [unit] if lesion is None else [unit, by_key[lesion.provider]]
    needed += [other.anchor for other in needed if other.anchor is not None]
    files = {path for own in needed for path in (own.path, *own.external.files)}
    return files if lesion is None else files.union(lesion.files)


def mask_remarks(tasks: Sequence[Task]) -> list[Remark]:
    """Report lesion masks that are empty, belong to a control, or are missing for some images of a session.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of a participant.

    Returns
    -------
    list of Remark
        One per participant or image.
    """
    masked = [task for task in tasks if task.lesion is not None]
    sessions = {task.unit.session for task in masked}
    remarks = []
    for task in masked:
        subject = f"sub-{task.unit.subject}"
        if task.is_control and not task.lesion.is_empty:
            remarks.append(
                Remark(
                    "Healthy controls (participants.tsv) with a lesion in the lesion mask: ",
                    subject,
                    "; they are evaluated as controls",
                )
            )
        elif task.lesion.is_empty and not task.is_control:
            remarks.append(
                Remark(
                    "Empty lesion mask: ",
                    subject,
                    "; Dice is 1 if no anomaly is detected and 0 otherwise, and these participants are "
                    "counted separately",
                )
            )
    return remarks + [
        Remark(
            "No lesion mask for ",
            task.unit.key,
            ": the entities of the masks of their session match other images only",
        )
        for task in tasks
        if task.lesion is None and not task.anchor_only and task.unit.session in sessions
    ]


def model_remarks(tasks: Sequence[Task]) -> list[Remark]:
    """Report outdated outputs of models that are not among those of the run.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of a participant.

    Returns
    -------
    list of Remark
        One per image.
    """
    return [
        Remark(
            f"the outputs of {truncate_list(sorted(task.outdated_models), 5)} are outdated for ",
            task.unit.key,
            ", since inputs or options have changed; they are removed, run with these --models to write them "
            "again",
        )
        for task in tasks
        if task.outdated_models
    ]


class ImageLocks:
    """Locks on images, which jobs that share the output or work folder hold while they process them.

    If two jobs need the same image, such as an anchor, one waits for the other, and finds the image up to
    date.

    Parameters
    ----------
    config : RunConfig
        `output_dir`, `work_dir` and `clean_workdir` are used.
    """

    def __init__(self, config: RunConfig) -> None:
        self._everything = config.clean_workdir
        self._files = [
            NameLocks(folder / "images.lock") for folder in (config.output_dir / "logs", config.work_dir)
        ]

    @contextmanager
    def hold(self, plan: Callable[[], list[Task]]) -> Iterator[list[Task] | str]:
        """Plan a participant, and lock the images that the run processes, without waiting.

        Parameters
        ----------
        plan : callable
            Returns the tasks; called again after images were locked, since another job may have changed them.

        Yields
        ------
        list of Task or str
            Tasks planned while their images are locked, or the name of an image that another job has locked.
        """
        held: set[str] = set()
        try:
            while True:
                tasks = plan()
                needed = images_in_use(tasks, everything=self._everything) - held
                taken = self._acquire(needed)
                if taken is not None or not needed:
                    break
                held |= needed
            yield tasks if taken is None else taken
        finally:
            for file in self._files:
                file.release(held)

    def _acquire(self, names: set[str]) -> str | None:
        """Lock names in both folders or, if another job has locked one, in none; return that one."""
        for number, file in enumerate(self._files if names else []):
            taken = file.acquire(sorted(names))
            if taken is not None:
                for other in self._files[:number]:
                    other.release(names)
                return taken
        return None

    def close(self) -> None:
        """Release all locks."""
        for file in self._files:
            file.close()


def images_in_use(tasks: Sequence[Task], *, everything: bool) -> set[str]:
    """Return the names of the images whose working folders a run uses or removes.

    Parameters
    ----------
    tasks : sequence of Task
        Tasks of a participant.
    everything : bool
        Whether the working folders of all images are removed.

    Returns
    -------
    set of str
        Names, such as `sub-01_T1w`.
    """
    if everything:
        return {task.unit.key for task in tasks}
    return {task.unit.key for part in split_tasks(tasks) for task in part}


def remove_temporary_files(output_dir: Path, subject: str | None = None) -> None:
    """Remove the temporary files that killed runs have left in the output folder.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    subject : str, optional
        Label, without `sub-`, of the participant whose folder is searched; by default the folders of the
        whole dataset are.
    """
    if subject is not None:
        remove_unfinished(output_dir / f"sub-{subject}", below=True)
        return
    for folder in (output_dir, output_dir / "logs"):
        remove_unfinished(folder)
    remove_unfinished(output_dir / "tpl-SRI24", below=True)


def remove_outdated(task: Task, config: RunConfig) -> None:
    """Remove outdated outputs of an image, and temporary files of a run that was killed.

    Parameters
    ----------
    task : Task
        The image, with the models that are about to write.
    config : RunConfig
        `output_dir`, and options that the outputs of models depend on, are used.
    """
    remove_unfinished(config.output_dir / task.unit.folder, lambda name: _is_output_of(name, task.unit))
    identities = {bundle.scored_as: model_identity(bundle, config, task.person) for bundle in task.bundles}
    path = record_path(config.output_dir, task.unit)
    withdraw_outputs(path, config.output_dir, task.fingerprint, identities)


def _is_output_of(name: str, unit: ImageUnit) -> bool:
    """Return whether a file name has the entities and modality of an image."""
    keys = {key: entity for entity, key in PREFIX_ENTITIES}
    entities = {keys[key]: value for key, value in entities_of(Path(name)).items() if key in keys}
    # Labels of the image itself may name a modality, such as acq-FLAIR of a T2w.
    rest = name.removeprefix(unit.prefix)
    others = [modality for modality in MODALITIES if modality != unit.modality]
    return entities == unit.entities and not any(other in rest for other in others)


def remove_unusable(problems: Sequence[Problem], config: RunConfig) -> None:
    """Remove the outputs of unusable images whose file has changed since they were written.

    The outputs of files that are missing or unreadable are kept.

    Parameters
    ----------
    problems : sequence of Problem
        Images that cannot be used.
    config : RunConfig
        `bids_dir` and `output_dir` are used.
    """
    for problem in problems:
        for path in (config.output_dir / f"sub-{problem.subject}").glob(f"**/log/{problem.key}.json"):
            record = read_record(path)
            source = None if record is None else config.bids_dir / record.source
            if source is None or not source.is_file():
                continue
            try:
                checksum = sha256_of(source)
            except InputError:
                continue
            if record.fingerprint.get("input_sha256") != checksum:
                withdraw_outputs(path, config.output_dir, {"input_sha256": checksum}, {})


def crash_dir(config: RunConfig, subject: str) -> Path:
    """Return the folder of a participant's crash files."""
    return config.output_dir / f"sub-{subject}" / "log" / config.run_id
