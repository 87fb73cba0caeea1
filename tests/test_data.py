"""MNIST: unpacked, downloaded, or one sentence that says what to do."""

import ast
import contextlib
import functools
import gzip
import http.server
import os
import shutil
import threading

import nbformat
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, copy_data, defines, read
from nbclient import NotebookClient

COMMITTED = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = [name for name, _ in torchvision.datasets.MNIST.resources]
NOWHERE = "http://127.0.0.1:9/"  # refuses every connection
IMAGES = "train-images-idx3-ubyte.gz"  # the first to be unpacked
LABELS = "t10k-labels-idx1-ubyte.gz"  # the last


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [NOWHERE])


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Go to a folder that holds the four archives; return their folder."""
    monkeypatch.chdir(tmp_path)
    return copy_data(tmp_path)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "MNIST" / "raw"


@functools.cache
def unpacked(archive):
    """Return the bytes of a committed archive, unpacked without torch."""
    return gzip.decompress((COMMITTED / archive).read_bytes())


def unpack(raw):
    """Unpack the committed archives to the folder raw."""
    for archive in ARCHIVES:
        file = raw / archive.removesuffix(".gz")
        file.write_bytes(unpacked(archive))


def check_data(images, labels, part):
    """Check a loaded part, "train" or "t10k", against the archives."""
    content = unpacked(f"{part}-images-idx3-ubyte.gz")[16:]
    expected = np.frombuffer(content, np.uint8).reshape(-1, 1, 28, 28)
    assert images.shape == expected.shape
    some = slice(99, None, 100)  # up to the last image
    pixels = (images[some].cpu() * 0.3081 + 0.1307) * 255
    np.testing.assert_allclose(pixels, expected[some], rtol=0, atol=1e-3)
    content = unpacked(f"{part}-labels-idx1-ubyte.gz")[8:]
    assert bytes(labels.tolist()) == content


def check_loads(load):
    check_data(*load(train=True), "train")
    check_data(*load(train=False), "t10k")


def sentence(fwdgrad, train=False):
    """Return the sentence that a load fails with; check its form."""
    with pytest.raises(fwdgrad.DataError) as caught:
        fwdgrad.load_mnist(train)
    error, text = caught.value, str(caught.value)
    assert error.__cause__ is None and error.__suppress_context__
    assert "\n" not in text and len(text) < 300
    where = os.path.join("data", "MNIST", "raw")
    assert where in text.partition(":")[0]
    return text


@contextlib.contextmanager
def serve(handler):
    """Serve on loopback for as long as the block lasts; yield the URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the folder of the committed archives, and logs nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, directory=COMMITTED, **kwargs)

    def log_message(self, *args):
        pass


class Damaged(Quiet):
    """Sends other bytes than were asked for, but as many as announced."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(1000))


class BreaksOff(Quiet):
    """Announces a whole archive, and hangs up in the middle of it."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read(2000))


class HangsUp(Quiet):
    """Closes the connection without an answer."""

    def do_HEAD(self):
        self.close_connection = True

    do_GET = do_HEAD


@contextlib.contextmanager
def read_only(folder):
    """Go to folder, where nobody can write, as a user who is not root."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        if os.access(".", os.W_OK, effective_ids=root):
            pytest.skip("this system lets everybody write everywhere")
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


def run_alone(folder, mirror, cell):
    """Run the notebook's definitions and a cell in a kernel of its own.

    Returns the outputs.  The folder needs to hold nothing at all.
    """
    trees = [
        ast.parse(cell.source)
        for cell in read("fwdgrad").cells
        if cell.cell_type == "code"
    ]
    body = [node for tree in trees for node in tree.body if defines(node)]
    set_up = ast.unparse(ast.Module(body, type_ignores=[]))
    set_up += f"\ntorchvision.datasets.MNIST.mirrors = [{mirror!r}]"
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(s) for s in (set_up, cell)]
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        resources=resources,
        kernel_name="python3",
        timeout=300,
        allow_errors=True,
    )
    client.execute()
    assert notebook.cells[0].outputs == []
    return notebook.cells[1].outputs


def test_archives_of_a_clone_are_unpacked_offline(fwdgrad, clone):
    check_loads(fwdgrad.load_mnist)


def test_images_are_normalised_and_labels_are_digits(fwdgrad, clone):
    images, labels = fwdgrad.load_mnist(train=True)
    assert images.shape == (60_000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert labels.shape == (60_000,) and labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    images, labels = fwdgrad.load_mnist(train=False)
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.shape == (10_000,)
    assert images.device.type == labels.device.type == fwdgrad.DEVICE.type


def test_data_unpacked_before_is_left_alone(fwdgrad, clone):
    unpack(clone)
    for archive in ARCHIVES:
        (clone / archive).unlink()
    files = {file: file.stat().st_mtime_ns for file in clone.iterdir()}
    assert len(files) == 4
    check_loads(fwdgrad.load_mnist)
    assert files == {f: f.stat().st_mtime_ns for f in clone.iterdir()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("archive", "damage"),
    [
        (IMAGES, flip),
        (IMAGES, truncate),
        (IMAGES, os.remove),
        (LABELS, flip),
        (LABELS, os.remove),
    ],
)
def test_bad_archive_offline_is_one_sentence(fwdgrad, clone, archive, damage):
    damage(clone / archive)
    text = sentence(fwdgrad)
    assert "missing or damaged" in text
    assert "connect to the internet" in text
    assert "copy the four .gz files" in text
    shutil.copy(COMMITTED / archive, clone)
    check_data(*fwdgrad.load_mnist(train=False), "t10k")


def test_no_archive_at_all_offline_is_one_sentence(fwdgrad, empty):
    assert "copy the four .gz files" in sentence(fwdgrad, train=True)
    assert not list(empty.rglob("*ubyte*"))


@pytest.mark.parametrize("files", ["none", "archives", "half-written"])
def test_read_only_folder_is_one_sentence(fwdgrad, tmp_path, clone, files):
    if files == "none":
        shutil.rmtree(tmp_path / "data")
    if files == "half-written":
        unpack(clone)
        truncate(clone / IMAGES.removesuffix(".gz"))
    with read_only(tmp_path):
        text = sentence(fwdgrad)
    assert "cannot be written" in text
    assert "copy this notebook to a folder of your own" in text


def test_read_only_folder_of_unpacked_data_is_enough(
    fwdgrad, tmp_path, clone
):
    check_loads(fwdgrad.load_mnist)  # Python imports what it takes, too
    with read_only(tmp_path):
        check_loads(fwdgrad.load_mnist)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_half_written_file_is_not_taken_for_data(fwdgrad, clone, archive):
    unpack(clone)
    truncate(clone / archive.removesuffix(".gz"))
    part = archive.partition("-")[0]
    check_data(*fwdgrad.load_mnist(train=part == "train"), part)


def test_half_written_file_without_archives_is_one_sentence(fwdgrad, clone):
    unpack(clone)
    truncate(clone / IMAGES.removesuffix(".gz"))
    (clone / IMAGES).unlink()
    assert "missing or damaged" in sentence(fwdgrad, train=True)
    assert "missing or damaged" in sentence(fwdgrad, train=True)


def test_unpacking_that_breaks_off_leaves_nothing_to_trust(fwdgrad, clone):
    """A limit on the size of files plays the disk that is full."""
    resource = pytest.importorskip("resource")
    unpack(clone)
    (clone / IMAGES.removesuffix(".gz")).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        sentence(fwdgrad, train=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_loads(fwdgrad.load_mnist)


@pytest.mark.parametrize("server", [Damaged, BreaksOff, HangsUp])
def test_bad_download_is_one_sentence_and_not_kept(
    fwdgrad, empty, monkeypatch, server
):
    with serve(server) as url, serve(Quiet) as good:
        mnist = torchvision.datasets.MNIST
        monkeypatch.setattr(mnist, "mirrors", [url])
        assert "could not be downloaded" in sentence(fwdgrad)
        monkeypatch.setattr(mnist, "mirrors", [good])
        check_data(*fwdgrad.load_mnist(train=False), "t10k")


def test_damaged_archive_is_downloaded_again(fwdgrad, clone, monkeypatch):
    flip(clone / IMAGES)
    with serve(Quiet) as url:
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        check_loads(fwdgrad.load_mnist)
    assert (clone / IMAGES).read_bytes() == (COMMITTED / IMAGES).read_bytes()


def test_notebook_alone_in_a_folder_downloads_the_data(fwdgrad, empty):
    cells = [cell.source for cell in read("fwdgrad").cells]
    (cell,) = (s for s in cells if "load_mnist(train=True)" in s)
    with serve(Quiet) as url:
        outputs = run_alone(".", url, cell)
    assert not [o for o in outputs if o.output_type == "error"], outputs
    assert {f.name for f in empty.glob("*.gz")} == set(ARCHIVES)
    check_loads(fwdgrad.load_mnist)


def test_jupyter_shows_a_failed_load_as_one_line(empty):
    (output,) = run_alone(".", NOWHERE, "load_mnist(train=True)")
    assert output.output_type == "error"
    assert output.ename == "DataError"
    (line,) = output.traceback
    assert line == f"DataError: {output.evalue}"
    assert "\n" not in line and "connect to the internet" in line
