"""Runs on Ray: the same rows, whatever dies, and one sentence where there is no cluster.

Two nodes on this machine serve all of these tests, with an engine that invents its replies; only the
last ones run the real model.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Parrot
from ray_cluster import Cluster, finish, wait_for
from test_data_curate import some_rows
from test_kills import by_id, recorded, undisturbed, whole_rows, write_seeds

from parrot_edge.cluster.connection import Node
from parrot_edge.cluster.files import PIECE_BYTES, PackedFile, PackedModel, find_or_fetch, read_piece
from parrot_edge.cluster.plan import plan_workers
from parrot_edge.errors import ModelError
from parrot_edge.models import LocalModel

RUN = ["simulate", "seeds.jsonl", "-o", "out.jsonl", "--turns", 6, "--parallel", 4]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of a CPU each."""
    pytest.importorskip("ray")
    nodes = Cluster(1, 1)
    yield nodes
    nodes.end()


# The plan and the files


def node(name: str = "a", **given: int) -> Node:
    return Node(**{"id": name, "name": name, "cpus": 8, "gpus": 0, "memory": 10**11, "cores": 8,
                   "offloads": False, **given})  # fmt: skip


def test_node_gets_a_worker_for_sixteen_cores() -> None:
    assert [place.threads for place in plan_workers([node(), node("b", cpus=64, cores=48)], 10**9)] == [
        8, 16, 16, 16,
    ]  # fmt: skip


def test_node_gets_no_more_workers_than_fit_its_memory() -> None:
    places = plan_workers([node(cpus=64, cores=64, memory=25 * 10**8)], 10**9)
    assert [(place.memory, place.threads) for place in places] == [(10**9, 16)] * 2


def test_given_threads_decide_how_many_workers_a_node_gets() -> None:
    assert len(plan_workers([node()], 10**9, threads=2)) == 4


def test_gpu_gets_a_worker_where_llama_cpp_can_use_it() -> None:
    assert [place.gpus for place in plan_workers([node(gpus=2, offloads=True)], 10**9)] == [1, 1]
    assert [place.gpus for place in plan_workers([node(gpus=2)], 10**9)] == [0]


def test_node_without_cpus_to_give_gets_no_worker() -> None:
    assert plan_workers([node(cpus=0)], 10**9) == []


def read_nothing(path: Path, offset: int, size: int) -> bytes:
    raise AssertionError("the file is here")


def test_file_that_the_node_has_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    assert find_or_fetch(PackedFile.of(path), read_nothing) == path


def test_file_is_sent_once_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARROT_HOME", str(tmp_path / "home"))
    path, hidden = tmp_path / "model.gguf", tmp_path / "hidden"
    path.write_bytes(b"weights" * (PIECE_BYTES // 4))
    packed = PackedModel.of(LocalModel("name", path))
    path.rename(hidden)  # on the node that path is not there
    model = packed.unpack(lambda path, offset, size: read_piece(hidden, offset, size))
    assert (model.name, model.path.read_bytes()) == ("name", hidden.read_bytes())
    assert packed.unpack(read_nothing).path == model.path


def test_file_of_the_same_size_and_other_content_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARROT_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    packed = PackedFile.of(path)
    path.write_bytes(b"two")
    assert find_or_fetch(packed, lambda *_: b"one").read_bytes() == b"one"
    path.write_bytes(b"six")
    with pytest.raises(ModelError, match="changed while it was sent"):
        find_or_fetch(PackedFile(path, 3, 0, "0" * 64), read_piece)
    assert len([each for each in (tmp_path / "home").rglob("*") if each.name.endswith("model.gguf")]) == 1


# Where there is no cluster


def fails_with(parrot: Parrot, *arguments: object, code: int = 1, **options: str) -> str:
    """The one sentence of a run that leaves nothing behind."""
    write_seeds(parrot.folder, 2)
    done = parrot(*RUN, *arguments, env=options)
    assert (done.returncode, done.stdout) == (code, "")
    assert not (parrot.folder / "out.jsonl").exists()
    assert done.stderr.startswith("parrot: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_address_without_a_cluster_is_refused_at_once(scripted_parrot: Parrot) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        begun = time.monotonic()
        said = fails_with(scripted_parrot, "--ray", f"127.0.0.1:{taken.getsockname()[1]}")
    assert "no cluster is at 127.0.0.1" in said
    assert time.monotonic() - begun < 20


def test_server_that_is_not_ray_is_refused_at_once(scripted_parrot: Parrot) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = fails_with(scripted_parrot, "--ray", f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert "what answers there is not Ray" in said


@pytest.mark.parametrize("address", ["nowhere", "ray://host:10001", "host:99999", ":6379"])
def test_what_can_be_no_address_is_misuse(address: str, scripted_parrot: Parrot) -> None:
    assert "host:port" in fails_with(scripted_parrot, "--ray", address, code=2)


def test_missing_extra_names_the_pip_line(scripted_parrot: Parrot, tmp_path: Path) -> None:
    (tmp_path / "without" / "ray").mkdir(parents=True)
    (tmp_path / "without" / "ray" / "__init__.py").write_text("raise ImportError")
    path = f"{tmp_path / 'without'}:{scripted_parrot.environment['PYTHONPATH']}"
    said = fails_with(scripted_parrot, "--ray", "auto", PYTHONPATH=path)
    assert "pip install 'parrot-edge[ray]'" in said


def test_cluster_of_another_ray_is_refused(cluster: Cluster, scripted_parrot: Parrot) -> None:
    said = fails_with(scripted_parrot, "--ray", cluster.address, RAY_VERSION="2.0.1")
    assert re.search(r"runs Ray 2\.\S+ on Python \S+, and this is Ray 2\.0\.1 on Python", said)


def test_two_endpoints_leave_nothing_to_spread(cluster: Cluster, parrot: Parrot) -> None:
    sides = ["--ask", "http://127.0.0.1:1/v1#a", "--chat", "http://127.0.0.1:1/v1#b"]
    assert "nothing to spread" in fails_with(parrot, "--ray", cluster.address, *sides, code=2)


# The same rows


def test_rows_are_the_local_ones_and_alone_on_stdout(cluster: Cluster, scripted_parrot: Parrot) -> None:
    write_seeds(scripted_parrot.folder, 30)
    expected = undisturbed(scripted_parrot)
    run = [each for each in RUN if each not in ("-o", "out.jsonl")]
    code, out, errors = finish(scripted_parrot.start(*run, "--ray", cluster.address))
    assert (code, errors) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 30
    assert {row["id"]: row for row in rows} == expected


def test_killed_workers_and_a_killed_driver_lose_nothing(
    cluster: Cluster, scripted_parrot: Parrot, tmp_path: Path
) -> None:
    """Also: a run that was begun here goes on there, and the other way round."""
    write_seeds(tmp_path, 60)
    expected = undisturbed(scripted_parrot)

    def run_until(rows: int, *arguments: object) -> subprocess.Popen[bytes]:
        process = scripted_parrot.start(*RUN, *arguments, "--resume", env={"REPLY_SECONDS": "0.1"})
        wait_for(lambda: len(whole_rows(tmp_path / "out.jsonl")) >= rows, process)
        return process

    here = run_until(5)
    here.kill()
    here.communicate()
    there = run_until(15, "--ray", cluster.address)
    known = recorded(tmp_path)
    there.kill()
    there.communicate()
    assert known <= recorded(tmp_path)
    process = run_until(25, "--ray", cluster.address)
    for _ in range(2):
        wait_for(lambda: len(cluster.workers()) == 2)
        os.kill(cluster.workers()[0], signal.SIGKILL)
        wait_for(lambda: len(cluster.workers()) == 1)
    assert finish(process) == (0, "", "")
    assert by_id(tmp_path / "out.jsonl") == expected
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_interrupted_run_says_how_to_go_on(cluster: Cluster, scripted_parrot: Parrot, tmp_path: Path) -> None:
    write_seeds(tmp_path, 60)
    process = scripted_parrot.start(*RUN, "--ray", cluster.address, env={"REPLY_SECONDS": "0.1"})
    wait_for(lambda: len(whole_rows(tmp_path / "out.jsonl")) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGTERM
    assert errors.startswith("parrot: stopped; carry on with: parrot simulate --resume")
    wait_for(lambda: not cluster.workers())


def test_exact_rows_of_the_real_model_are_the_local_ones(
    cluster: Cluster, parrot: Parrot, model_file: Path, tmp_path: Path
) -> None:
    rows = [{"id": str(n), "prompt": f"Tell me about the number {n}."} for n in range(4)]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = ["--ask", model_file, "--chat", model_file, "--exact", "--threads", 1]
    small = ["--turns", 2, "--max-tokens", 12, "--parallel", 2]
    for name, ray in (("here", []), ("there", ["--ray", cluster.address])):
        run = ["simulate", "seeds.jsonl", "-o", f"{name}.jsonl", *sides, *small, *ray]
        assert finish(parrot.start(*run)) == (0, "", "")
    assert by_id(tmp_path / "here.jsonl") == by_id(tmp_path / "there.jsonl")


# Curating and hearing


def test_curated_files_are_the_local_ones(cluster: Cluster, parrot: Parrot, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in some_rows(150)]
    rows[20] = '{"messages": "none"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for folder, ray in (("here", []), ("there", ["--ray", cluster.address])):
        parrot.folder = tmp_path / folder
        parrot.folder.mkdir()
        run = ["curate", "../rows.jsonl", "-o", "out.jsonl", "--on-error", "skip", *ray]
        code, out, errors = finish(parrot.start(*run))
        assert (code, out) == (0, "")
        assert "150 rows" in errors
    names = ["out.jsonl", "out.jsonl.curate.json", "out.jsonl.rejects.jsonl"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == names
    for name in names:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_bad_row_ends_curation_after_the_rows_before_it(
    cluster: Cluster, parrot: Parrot, tmp_path: Path
) -> None:
    rows = [json.dumps(row) for row in some_rows(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "no row"]) + "\n")
    outputs = []
    for ray in ([], ["--ray", cluster.address]):
        run = ["curate", "rows.jsonl", "-o", f"out{len(ray)}.jsonl", *ray]
        code, _, errors = finish(parrot.start(*run))
        assert (code, errors.split(" (")[0]) == (1, "parrot: rows.jsonl:81: is not JSON")
        outputs.append((tmp_path / f"out{len(ray)}.jsonl").read_bytes())
    assert outputs[0] == outputs[1] != b""


def test_recordings_are_heard_as_locally(cluster: Cluster, parrot: Parrot, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    from test_dialect_export import CARD, TINY

    from parrot_edge.dialect.export import export_onnx
    from parrot_edge.dialect.network import build_network

    export_onnx(build_network(TINY, 3), CARD, tmp_path / "model.onnx")
    for number in range(6):
        noise = np.random.default_rng(number).standard_normal(16000 * (1 + number)) * 0.1
        soundfile.write(tmp_path / f"{number}.wav", noise, 16000)
    (tmp_path / "3.wav").write_bytes(b"no sound")
    files = [f"{number}.wav" for number in range(6)]
    run = ["dialect", "identify", *files, "--model", "model.onnx", "--window", 2, "--on-error", "skip"]
    here, there = (finish(parrot.start(*run, *ray)) for ray in ([], ["--ray", cluster.address]))
    assert here[0] == 0
    assert len(here[1].splitlines()) > 5
    assert there == here


# Clusters that cannot be used, each a new one


def test_node_without_parrot_is_named(scripted_parrot: Parrot, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "without" / "parrot_edge").mkdir(parents=True)
    (tmp_path / "without" / "parrot_edge" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'parrot_edge'\", name='parrot_edge')"
    )
    nodes = Cluster(1, PYTHONPATH=str(tmp_path / "without"))
    try:
        said = fails_with(scripted_parrot, "--ray", nodes.address)
    finally:
        nodes.end()
    assert "lacks parrot_edge; run `pip install" in said


def test_cluster_that_loses_its_last_node_ends_the_run(scripted_parrot: Parrot, tmp_path: Path) -> None:
    """The head has no CPU to give, so the other node is the last one with a worker."""
    pytest.importorskip("ray")
    write_seeds(tmp_path, 40)
    expected = undisturbed(scripted_parrot)
    nodes = Cluster(0, 1)
    environment = {"REPLY_SECONDS": "0.1", "PATIENCE": "8"}
    try:
        process = scripted_parrot.start(*RUN, "--ray", nodes.address, env=environment)
        wait_for(lambda: len(whole_rows(tmp_path / "out.jsonl")) >= 3, process)
        nodes.remove_node()
        code, out, errors = finish(process)
    finally:
        nodes.end()
    assert (code, out) == (1, "")
    assert re.fullmatch(r"parrot: the cluster at \S+ has had no worker for 8 s; .* --resume\n", errors)
    assert scripted_parrot(*RUN, "--resume").returncode == 0
    assert by_id(tmp_path / "out.jsonl") == expected


def test_cluster_that_loses_its_head_ends_the_run(scripted_parrot: Parrot, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_seeds(tmp_path, 40)
    expected = undisturbed(scripted_parrot)
    nodes = Cluster(1)
    try:
        process = scripted_parrot.start(*RUN, "--ray", nodes.address, env={"REPLY_SECONDS": "0.4"})
        wait_for(lambda: len(whole_rows(tmp_path / "out.jsonl")) >= 1, process)
        nodes.kill_head()
        code, out, errors = finish(process)
    finally:
        nodes.end()
    assert (code, out) == (1, "")
    assert re.fullmatch(r"parrot: the cluster at \S+ has lost its head; .* --resume\n", errors)
    assert scripted_parrot(*RUN, "--resume").returncode == 0
    assert by_id(tmp_path / "out.jsonl") == expected
