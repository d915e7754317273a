"""Folders that cannot be written: full or read-only disks, missing permission, files in the way."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bids_uad.cli.main import main
from bids_uad.errors import StorageError, describe_os_error, storage_error
from tests.dataset.skeleton import write_dataset
from tests.levels.fakes import fake_reference
from tests.levels.interrupted import Bench, Forked, content, difference, stand_ins, target

UNWRITABLE = 73
TEMPORARY = re.compile(r"\.[0-9a-f]{6}-\d+-[0-9a-f]{6}\.")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("storage"))
    with stand_ins(fake_reference(bench.inputs.folder)):
        yield bench


def may_mount() -> bool:
    """Return whether this process can mount a tmpfs."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return probe.returncode == 0


@contextmanager
def small_disk(folder: Path, size: int):
    """Mount a tmpfs of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted disk; one that is being written to is busy."""
    command = ["mount", "-o", f"remount,{options}", folder]
    for _ in range(500):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.002)
    raise TimeoutError(folder)


def size_of(folder: Path) -> int:
    """Sum up the pages that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file
            total += -(-path.stat().st_size // 4096) * 4096 if path.is_file() else 0
    return total


CASES = [
    ("participant", "out"),
    ("participant", "work"),
    ("group", "out"),
    ("reports", "out"),
    ("train", "trained"),
    ("train", "work"),
    ("calibrate", "trained"),
]


def check_refusal(process: Forked, folder: Path, reason: str) -> None:
    """Check that a run ended with one line about a folder."""
    code, said = process.wait(300), process.log.read_text()
    assert code == UNWRITABLE, said
    assert "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith(f"bids_uad: {folder}"), said
    assert f"cannot be written ({reason})" in last
    assert "run the same command again" in last
    assert said.count(reason) + said.count(reason.capitalize()) == 1, said


def check_whole(study, level, before: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Check that each file is what it was before or will be in the end."""
    found = content(target(study, level))
    json.loads(found.pop("dataset_description.json", b"{}"))  # which grows as the run goes on
    assert [name for name in found if found[name] not in (before.get(name), expected.get(name))] == []


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a disk")
@pytest.mark.parametrize(("level", "place"), CASES)
def test_a_full_disk(bench, tmp_path, level, place):
    bench.undisturbed(level)
    roomy = 1 << 30
    with small_disk(tmp_path / "disk", roomy) as disk:
        study = bench.prepared(level, f"{level}-{place}", **{place: disk / place})
        before = content(target(study, level))
        grown = size_of(bench.work[level] if place == "work" else bench.whole[level]) - size_of(disk)
        remount(disk, f"size={size_of(disk) + max(4096, grown // 3)}")
        process = Forked(study.arguments(level), tmp_path / "first.log")
        check_refusal(process, getattr(study, place), "no space left on device")
        check_whole(study, level, before, bench.expected[level])
        assert [path for path in disk.rglob(".*") if TEMPORARY.match(path.name)] == []
        remount(disk, f"size={roomy}")
        again = Forked(study.arguments(level), tmp_path / "again.log")
        assert again.wait(300) == 0, again.log.read_text()
        assert difference(content(target(study, level)), bench.expected[level]) == []
        assert [path for path in disk.rglob(".*") if TEMPORARY.match(path.name)] == []


def close_folders(root: Path, mode: int) -> None:
    """Change the permissions of a folder and of all below it."""
    for folder, _, _ in os.walk(root):
        Path(folder).chmod(mode)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "place"), CASES)
def test_a_folder_that_turns_read_only(bench, tmp_path, level, place):
    bench.undisturbed(level)
    study = bench.prepared(level, f"{level}-{place}", **{place: tmp_path / place})
    folder = getattr(study, place)
    folder.mkdir(exist_ok=True)
    before = content(target(study, level))
    process = Forked(study.arguments(level), tmp_path / "first.log", first=drop_privileges)
    assert process.wait(0.3 * bench.seconds[level]) is None
    close_folders(folder, 0o555)
    try:
        check_refusal(process, folder, "permission denied")
        check_whole(study, level, before, bench.expected[level])
    finally:
        close_folders(folder, 0o755)
    again = Forked(study.arguments(level), tmp_path / "again.log")
    assert again.wait(300) == 0, again.log.read_text()
    assert difference(content(target(study, level)), bench.expected[level]) == []
    assert [path for path in folder.rglob(".*") if TEMPORARY.match(path.name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize(("level", "place"), [case for case in CASES if case[1] != "work"])
def test_files_that_cannot_be_renamed_into_place(bench, tmp_path, level, place, code):
    """The same where no disk can be mounted: every process fails after its first files."""
    most = 1 if level == "calibrate" else 2
    bench.undisturbed(level)
    study = bench.prepared(level, f"{level}-{place}", **{place: tmp_path / place})
    folder = getattr(study, place)
    before = content(target(study, level))
    replace, calls = os.replace, []

    def refuse(source, goal):
        if str(goal).startswith(str(folder)):
            calls.append(goal)
            if len(calls) > most:
                raise OSError(code, os.strerror(code), str(source), None, str(goal))
        replace(source, goal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        process = Forked(study.arguments(level), tmp_path / "first.log")
    check_refusal(process, folder, os.strerror(code).lower())
    check_whole(study, level, before, bench.expected[level])
    again = Forked(study.arguments(level), tmp_path / "again.log")
    assert again.wait(300) == 0, again.log.read_text()
    assert difference(content(target(study, level)), bench.expected[level]) == []


def drop_privileges() -> None:
    """Let permissions count for the superuser, too, in this process and those it starts (capset)."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for field in (
        0,
        1,
        2,
    ):  # effective, permitted, inheritable: not CAP_DAC_OVERRIDE, nor CAP_DAC_READ_SEARCH
        data[field] &= ~0b110
    assert libc.capset(header, data) == 0


@pytest.mark.parametrize("level", ["participant", "train"])
@pytest.mark.parametrize(
    ("place", "mode", "made"),
    [
        ("out", 0o555, True),
        ("out", 0o555, False),
        ("work", 0o555, True),
        ("work", 0o555, False),
        ("bids", 0o000, True),
        ("bids", 0o311, True),
    ],
)
def test_folders_without_permission_are_refused_before_anything_is_done(
    bench, tmp_path, level, place, mode, made
):
    study = bench.study("permission")
    study.raw = study.scans = tmp_path / "raw"
    write_dataset(study.raw, {"sub-01/anat/sub-01_T1w.nii.gz": None})
    folder = {"out": target(study, level), "work": study.work, "bids": study.raw}[place]
    folder.mkdir(exist_ok=True)
    closed = folder
    if not made:
        shutil.rmtree(folder)
        closed, folder = folder, folder / "new" / "newer"
        closed.mkdir()
        setattr(study, "trained" if (place, level) == ("out", "train") else place, folder)
    closed.chmod(mode)
    try:
        process = Forked(study.arguments(level), tmp_path / "log", first=drop_privileges)
        code, said = process.wait(60), process.log.read_text()
    finally:
        closed.chmod(0o755)
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1, said
    if place == "bids":
        assert code == 66
        assert said.startswith(f"bids_uad: {folder}: the file cannot be read (Permission denied)")
    else:
        assert code == UNWRITABLE
        assert said.startswith(f"bids_uad: {folder}: cannot be written (permission denied); get permission")
    assert list(closed.glob("*")) == [path for path in closed.glob("*") if place == "bids"]


@pytest.mark.parametrize("level", ["participant", "train"])
def test_files_in_the_way_of_folders_are_named(bench, tmp_path, capsys, level):
    study = bench.study("in-the-way")
    file = tmp_path / "file"
    file.write_text("x")
    words = f"bids_uad: {file}: cannot be written (not a directory); remove the file"
    for place in ("trained" if level == "train" else "out", "work"):
        usual = getattr(study, place)
        setattr(study, place, file / "below")
        assert main(study.arguments(level)) == UNWRITABLE
        assert words in capsys.readouterr().err
        setattr(study, place, file)
        assert main(study.arguments(level)) == 2
        assert f"{file}: not a folder; choose another" in capsys.readouterr().err
        setattr(study, place, usual)
    study.raw = study.scans = file
    assert main(study.arguments(level)) in (2, 66)
    said = capsys.readouterr().err
    assert str(file) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("level", "name"), [("participant", "logs"), ("group", "logs")])
def test_a_file_where_the_output_has_a_folder_is_named(bench, tmp_path, capsys, level, name):
    bench.undisturbed("participant")
    study = bench.study("inner")
    shutil.copytree(bench.whole["participant"], study.out)
    for folder in (name, "sub-01"):  # which is processed again
        shutil.rmtree(study.out / folder, ignore_errors=True)
    (study.out / name).write_text("x")
    assert main(study.arguments(level)) == UNWRITABLE
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"bids_uad: {study.out / name}")
    assert "remove the file that is where a folder is expected" in last


@pytest.mark.parametrize(
    ("message", "folder", "code"),
    [
        ("OSError: [Errno 28] No space left on device: '/out/sub-01/x.nii.gz'", "/out", errno.ENOSPC),
        ("PermissionError: [Errno 13] Permission denied: '/out/logs'", "/out", errno.EACCES),
        ("PermissionError: [Errno 13] Permission denied: '/raw/sub-01'", None, None),
        ("OSError: [Errno 30] Read-only file system: '/out/deep/work/x'", "/out/deep/work", errno.EROFS),
        ("OSError: [Errno 122] Disk quota exceeded: '/out/x'", "/out", errno.EDQUOT),
        ("ZeroDivisionError: nothing to divide by", None, None),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/out/x'", None, None),
    ],
)
def test_storage_error_names_the_folder_of_a_message(message, folder, code):
    found = storage_error(message, [Path("/out"), Path("/out/deep/work")], guess=True)
    assert (None if found is None else (found.folder, found.code)) == (folder and (folder, code))


def test_full_disk_that_numpy_reports_is_recognised(tmp_path):
    error = OSError("Not enough free space to write 35712000 bytes after offset 128")
    assert describe_os_error(error, [tmp_path]).code == errno.ENOSPC


def test_storage_error_can_be_pickled():
    import pickle

    error = StorageError("/out", errno.ENOSPC)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
