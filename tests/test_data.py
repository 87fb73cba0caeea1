"""MNIST: whole archives, a download, or one sentence that says what to do."""

import gzip
import http.server
import os
import re
import sys
import threading
from functools import partial

import nbformat
import pytest
import torch
import torchvision
from conftest import ROOT, code_cells, copy_data, read, run
from test_bad_days import NOWHERE, SETPRIV, read_only, shown

COMMITTED = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = [name for name, _ in torchvision.datasets.MNIST.resources]
BROKEN = {  # what becomes of an archive, on the disk or on its way
    "damaged": lambda archive: bytes(len(archive)),
    "broken off": lambda archive: archive[:2000],
    "gone": None,
}
FAILURES = [  # number of an archive, what it is here, what a server sends
    (0, "damaged", None),
    (3, "damaged", None),
    (1, "broken off", None),
    (2, "gone", None),
    (0, "gone", "damaged"),
    (3, "gone", "broken off"),
    (1, "gone", "gone"),
]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the committed archives, whole or broken, or speaks no HTTP."""

    def parse_request(self):
        if self.server.way is None:
            self.wfile.write(b"nonsense\r\n")
        return self.server.way is not None and super().parse_request()

    def copyfile(self, source, outputfile):
        outputfile.write(self.server.way(source.read()))

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def mirror(monkeypatch, tmp_path):
    """Go to a folder without network; return what connects to a server."""
    monkeypatch.chdir(tmp_path)
    mnist = torchvision.datasets.MNIST
    monkeypatch.setattr(mnist, "mirrors", [NOWHERE])
    handler = partial(Server, directory=COMMITTED)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/"

        def connect(way=bytes):
            server.way = way
            monkeypatch.setattr(mnist, "mirrors", [url])
            return url

        yield connect
        server.shutdown()


def check_loads(fwdgrad):
    """Compare the loaded data with the archives, unpacked without torch."""
    for train, part in [(True, "train"), (False, "t10k")]:
        images, labels = fwdgrad.load_mnist(train)
        pixels, digits = (
            gzip.decompress((COMMITTED / f"{part}-{kind}.gz").read_bytes())
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        assert bytes(labels.tolist()) == digits[8:]
        assert images.shape == (len(labels), 1, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        ours = ((images * 0.3081 + 0.1307) * 255).round().byte()
        assert ours.cpu().numpy().tobytes() == pixels[16:]


def sentence(fwdgrad):
    """Return the sentence that a load fails with; check its form."""
    with pytest.raises(fwdgrad.DataError) as caught:
        fwdgrad.load_mnist(train=True)
        fwdgrad.load_mnist(train=False)
    (line,) = caught.value._render_traceback_()  # what Jupyter shows
    assert line == f"DataError: {caught.value}"
    assert "\n" not in line and len(line) < 400
    assert os.path.join("data", "MNIST", "raw") in line
    return line


@pytest.mark.parametrize(("number", "here", "there"), FAILURES)
def test_a_bad_archive_is_one_sentence_until_it_can_be_fetched(
    fwdgrad, tmp_path, mirror, number, here, there
):
    file = copy_data(tmp_path) / ARCHIVES[number]
    original = file.read_bytes()
    file.unlink()
    if BROKEN[here]:
        file.write_bytes(BROKEN[here](original))
    if there:
        mirror(BROKEN[there])
    text = sentence(fwdgrad)
    assert "missing or damaged and could not be downloaded" in text
    assert "connect to the internet" in text
    assert "copy the four archives of the repository there" in text
    mirror()
    check_loads(fwdgrad)
    assert file.read_bytes() == original


def test_unpacked_files_are_neither_trusted_nor_made(fwdgrad, tmp_path):
    clone = copy_data(tmp_path)
    for archive in ARCHIVES:
        content = gzip.decompress((clone / archive).read_bytes())
        wrong = content[:16] + bytes(len(content) - 16)
        (clone / archive.removesuffix(".gz")).write_bytes(wrong)
    before = {f: f.stat().st_mtime_ns for f in clone.iterdir()}
    check_loads(fwdgrad)
    assert before == {f: f.stat().st_mtime_ns for f in clone.iterdir()}


def test_no_right_to_write_and_no_archive_is_one_sentence(tmp_path):
    if os.name != "posix" or (not os.geteuid() and not SETPRIV):
        pytest.skip("this user can write everywhere")
    code = "import conftest; conftest.lift('fwdgrad').load_mnist(True)"
    done = shown(
        [*read_only(tmp_path), sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert "make sure that the folder can be written to" in done.stderr


def test_a_full_disk_is_one_sentence(fwdgrad, mirror):
    """A limit on the size of files plays the disk that is full."""
    resource = pytest.importorskip("resource")
    mirror()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert "too large" in sentence(fwdgrad) and "has room" in sentence(fwdgrad)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_loads(fwdgrad)


def test_the_notebook_alone_in_a_folder_downloads_the_data(tmp_path, mirror):
    notebook = read("fwdgrad")
    sources = [cell.source for cell in code_cells(notebook)]
    loads = re.compile(r"(?<!def )\bload_mnist\(").search
    last = [*map(bool, map(loads, sources))].index(True)
    needed = [s for s in sources[:last] if "import " in s or "mnist" in s]
    patch = f"torchvision.datasets.MNIST.mirrors = [{mirror()!r}]"
    cells = [*needed, patch, sources[last]]
    notebook.cells = [nbformat.v4.new_code_cell(s) for s in cells]
    run(notebook, tmp_path)
    assert {f.name for f in tmp_path.rglob("*.gz")} == {*ARCHIVES}
