"""Files are written whole or not at all, through links, with their mode, and nothing is left beside them."""

import errno
import os
import resource
import stat
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.network import save
from convexprune.network.compact import Compaction
from convexprune.report import MergeReport, NetworkError, Report, Settings
from convexprune.report.merges import MergedLayer
from convexprune.report.row import Row
from convexprune.solution import Certificate
from convexprune.whole_file import write_whole

OLD = "what was there"


def report():
    settings = Settings("parallel", "ADMM()", 3, "ab" * 32, "float32", 0, 1, torch.__version__)
    return Report((Row("fc", (2, 2), 3),), NetworkError(None, None, None, "none"), settings)


def merge_report():
    layer = MergedLayer("fc", 2, 1, 0.5, 0.5, Certificate(0.5, 0.0, 0.0), (0.5,), 1, False)
    return MergeReport((layer,), Compaction({"fc": 1}, (), (6, 3)))


# every function of the package that writes a file to a path of the user
WRITERS = {
    "write_whole": lambda path: write_whole(path, "new"),
    "save_json": lambda path: report().save_json(path),
    "save_html": lambda path: report().save_html(path),
    "merge_html": lambda path: merge_report().save_html(path),
    "save": lambda path: save(torch.nn.Linear(2, 2), path),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def writer(request):
    return request.param


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_what_is_written_is_read_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("whole") / "file"
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(path.parent) == ["file"]


def test_a_symbolic_link_stays_and_the_mode_too(writer, tmp_path):
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text(OLD)
    target.chmod(0o640)
    link.symlink_to("there/target")  # relative to the link, not to the working directory
    writer(link)
    assert link.is_symlink()
    assert target.read_bytes() == link.read_bytes() != OLD.encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert os.listdir(target.parent) == ["target"]


def test_a_link_to_nothing_yet_is_written_through(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("target")
    write_whole(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_links_that_go_round_are_refused_and_stay(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(OSError, match="one"):
        write_whole(one, "new")
    assert (os.readlink(one), os.readlink(other)) == (str(other), str(one))
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_a_new_file_gets_the_mode_that_open_would_give(tmp_path):
    (tmp_path / "usual").write_text("")
    write_whole(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_and_untouched(writer, tmp_path, kind):
    path = tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(path)  # opening it would wait for a reader
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = "/dev/full"
    else:
        path.symlink_to("/dev/full")
    before, listed = os.lstat(path), os.listdir(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        writer(path)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert os.listdir(tmp_path) == listed
    assert not [name for name in os.listdir("/dev") if name.endswith(".part")]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(writer, tmp_path, monkeypatch, fault, function, there):
    path = tmp_path / "file"
    if there:
        path.write_text(OLD)

    def fails(*args):
        raise fault

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(type(fault)) as raised:
        writer(path)
    if isinstance(fault, OSError):
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(path)
    assert os.listdir(tmp_path) == (["file"] if there else [])
    assert not there or path.read_text() == OLD


def test_a_file_that_the_system_cuts_short_is_no_file(tmp_path):
    path = tmp_path / "file"
    path.write_text(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the 4097th byte fails, as on a full disk
        with pytest.raises(OSError, match="was not written") as raised:
            write_whole(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_path_leave_one_whole_file(tmp_path, monkeypatch):
    path, rounds = tmp_path / "file", 40
    contents = [b"a" * 70_000, b"b" * 30_000]
    names, replace = [], os.replace

    def seen(source, target):
        names.append(str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    write_whole(path, contents[0])
    errors, read = [], set()

    def write(content):
        try:
            for _ in range(rounds):
                write_whole(path, content)
                read.add(path.read_bytes())
        except BaseException as error:  # a thread's error is not the test's
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert read <= set(contents)
    assert len(set(names)) == 2 * rounds + 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write_whole(path, "new")
    assert path.read_text() == "new"
