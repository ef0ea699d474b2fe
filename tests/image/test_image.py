"""Build the image for real, and run it as the compose file says: as its user, read-only, with one volume.

There is no Docker in this. buildah builds the image, and runc runs it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.build import BuiltImage
from tests.image.container import PORT, SERVICE, Container, started
from tests.service.test_client_certificates import make
from tests.support.scrape import parsed

pytestmark = [pytest.mark.image, pytest.mark.needs("mount", "buildah", "debootstrap", "runc", "openssl")]

TOKENS = 4096


@pytest.fixture(scope="module")
def built() -> Iterator[BuiltImage]:
    # pytest would keep a temporary directory of its own, and this one is large.
    with tempfile.TemporaryDirectory() as directory:
        yield BuiltImage(Path(directory))


@pytest.fixture
def image(request: pytest.FixtureRequest) -> BuiltImage:
    """The image, which is built after a test's needs were checked."""
    image: BuiltImage = request.getfixturevalue("built")
    return image


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def container(image: BuiltImage, tmp_path: Path, volume: Path) -> Iterator[Container]:
    """A container on a new volume, with no variable set for the compose file."""
    with started(image, tmp_path / "container", volume) as container:
        yield container


def post(container: Container) -> None:
    status, answer = container.request("POST", "/v1/savings", {"model": "claude-sonnet-4-5", "tokens_saved": TOKENS})
    assert (status, json.loads(answer)["durable"]) == (200, True)


def saved(volume: Path) -> int:
    """The tokens in the document, for a reader that only knows JSON."""
    tokens: int = json.loads((volume / "proxy_savings.json").read_text())["lifetime"]["tokens_saved"]
    return tokens


def test_a_saving_at_the_published_port_is_durable(image: BuiltImage, container: Container) -> None:
    assert image.config["ExposedPorts"].keys() == {f"{PORT}/tcp"}
    post(container)
    status, answer = container.request("GET", "/v1/savings")
    assert (status, json.loads(answer)["lifetime"]["tokens_saved"]) == (200, TOKENS)


def test_the_healthcheck_of_the_image_succeeds(image: BuiltImage, container: Container) -> None:
    kind, *command = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    checked = container.exec(*command)
    assert checked.returncode == 0, checked.stderr


def test_the_healthcheck_succeeds_with_tls_and_a_token(image: BuiltImage, tmp_path: Path, volume: Path) -> None:
    """Also where the compose file for them is used. Plain HTTP does not reach the service."""
    web = tmp_path / "web"
    web.mkdir()
    make(web, "service")
    (web / "service.key").chmod(0o644)
    (web / "token").write_text("a-token-for-everything\n")
    (web / "web.yml").write_text(
        "tls_server_config: {cert_file: service.crt, key_file: service.key}\nauthorization: {credentials_file: token}\n"
    )
    _, *command = image.config["Healthcheck"]["Test"]
    with started(image, tmp_path / "container", volume, SAVINGS_EXPORTER_WEB=str(web)) as container:
        checked = container.exec(*command)
        assert (checked.returncode, checked.stderr) == (0, "")
        assert container.exec("env", "-u", "SAVINGS_EXPORTER_WEB_CONFIG_FILE", *command).returncode == 1


def test_it_has_prices(container: Container) -> None:
    assert re.search(r"^prices: (?!none)", container.log, re.M), container.log


def test_it_serves_its_documents_and_dashboards(container: Container) -> None:
    """The image has what the wheel has beside the code."""
    status, page = container.request("GET", "/docs/runbook")
    assert (status, "<h1" in page) == (200, True)
    written = container.exec("savings-exporter", "assets", "--output", "/tmp/assets")
    assert written.returncode == 0, written.stderr
    assert "savings.json" in container.exec("find", "/tmp/assets", "-name", "*.json").stdout


def test_verify_doctor_and_show_run_in_it(container: Container) -> None:
    post(container)
    for command, said in (
        ("verify", "/data/proxy_savings.json: 4096 tokens saved in 1 record"),
        ("show", "4,096"),
        ("doctor", "/data: "),
    ):
        done = container.exec("savings-exporter", command)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_a_drill_runs_in_it_where_drills_are_allowed(image: BuiltImage, tmp_path: Path, volume: Path) -> None:
    drill = ("savings-exporter", "drill", "journal-fsync")
    with started(image, tmp_path / "allowed", volume, SAVINGS_EXPORTER_ENABLE_DRILL="true") as container:
        begun = container.exec(*drill)
        assert begun.returncode == 0, begun.stderr
        assert parsed(container.request("GET", "/metrics")[1])['savings_drill_active{drill="journal-fsync"}'] == 1
        assert container.stop() == 0
    with started(image, tmp_path / "not-allowed", volume) as container:
        refused = container.exec(*drill)
        assert (refused.returncode, "no service that accepts drills" in refused.stderr) == (1, True)


def test_sigterm_ends_it_in_time_with_a_last_save(container: Container, volume: Path) -> None:
    """It is the first process of its container: the kernel drops a signal that such a process does not handle."""
    post(container)
    assert container.stop() == 0, container.log
    assert saved(volume) == TOKENS
    assert not list(volume.glob("*.journal.*"))


def test_another_container_continues_the_volume(image: BuiltImage, tmp_path: Path, volume: Path) -> None:
    for number in (1, 2):
        with started(image, tmp_path / f"container-{number}", volume) as container:
            post(container)
            assert container.stop() == 0, container.log
        assert saved(volume) == number * TOKENS


def test_it_is_its_user_and_has_no_capabilities(container: Container) -> None:
    uid, gid = SERVICE["user"].split(":")
    for process in ("1", "self"):
        status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", container.exec("cat", f"/proc/{process}/status").stdout, re.M))
        assert status["Uid"].split() == [uid] * 4
        assert status["Gid"].split() == [gid] * 4
        assert status["Groups"].split() in ([], [gid])
        assert {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")} == dict.fromkeys(
            ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0
        )
        assert status["NoNewPrivs"] == "1"


def test_only_its_volume_and_its_tmp_can_be_written(container: Container) -> None:
    """The runtime adds ``/dev/shm`` and ``/dev/mqueue``, which are memory."""
    find = ("find", "/", "-path", "/proc", "-prune", "-o", "-type", "d", "-writable", "-print")
    assert set(container.exec(*find).stdout.split()) == {"/data", "/tmp", "/dev/shm", "/dev/mqueue"}
    # The owner of the files is refused as well, because the file system is read-only.
    for directory in ("/", "/etc", "/opt/venv/bin", "/usr/bin"):
        refused = container.exec("touch", f"{directory}/new", user="0:0")
        assert (refused.returncode, "Read-only file system" in refused.stderr) == (1, True), directory
