"""Training from shards behind real servers: the bits of a run from local files."""

import json
import re
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.distributed
REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "launch" / "train.py"
EMBEDDED = REPOSITORY / "ds_configs" / "train" / "embedded.yaml"
#: Two image sizes besides the model's own, one of them not square.
RUN = [
    *("train.steps=12", "optim.warmup_steps=2", "checkpoint.every_steps=12", "log.every_steps=1"),
    *("eval.data=null", "train.global_batch_size=32", "data.shuffle_shards=2", "data.num_lanes=2"),
    "data.resolutions=[{from_step: 0, image_size: 16}, {from_step: 4, image_size: 32}, "
    "{from_step: 8, image_size: [24, 40]}]",
    "data.network.backoff=0.05",
]
EXACT = ["train/loss", "train/grad_norm", "train/logit_scale"]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def local_run(deepspeed_cpu, embedded_overrides, tmp_path_factory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("local")
    overrides = [*embedded_overrides, *RUN, f"output_dir={folder}", "name=run"]
    done = deepspeed_cpu(TRAIN, EMBEDDED, *overrides)
    assert done.returncode == 0, done.stderr
    return records(folder / "run")


class FlakyFiles(SimpleHTTPRequestHandler):
    """A folder, from a server that fails every third request for a tar, in turn 503 and cut."""

    asked: Counter[str]
    lock = threading.Lock()

    def do_GET(self) -> None:
        if not self.path.endswith(".tar"):
            return super().do_GET()
        with self.lock:
            self.asked[self.path] += 1
            turn = self.asked.total()
        if turn % 3 == 1:
            content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
            if turn % 2:
                self.send_error(503)
                return None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_http_run_equals_the_local_one(
    local_run, deepspeed_cpu, digits, embedded_overrides, tmp_path
):
    asked: Counter[str] = Counter()
    handler = type("Handler", (FlakyFiles,), {"asked": asked})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(digits / "train"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "cache"
    url = f"http://127.0.0.1:{server.server_port}/{{00000..00007}}.tar"
    where = [f"data.train=['{url}']", f"data.cache.dir={cache}"]
    try:
        overrides = [*embedded_overrides, *RUN, f"output_dir={tmp_path}", "name=run", *where]
        done = deepspeed_cpu(TRAIN, EMBEDDED, *overrides)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    ours = records(tmp_path / "run")
    assert [[r[tag] for tag in EXACT] for r in ours] == [
        [r[tag] for tag in EXACT] for r in local_run
    ]
    assert ours[-1]["data/skipped_samples"] == 0
    assert re.search(r"HTTP status 503|announced|ClientPayloadError", done.stderr)
    assert not list(cache.glob("*.partial"))
    # The ranks share the copies: 8 are fetched, each rank looks once, and a third of all fails.
    assert asked.total() <= 18


def test_s3_run_equals_the_local_one(
    local_run, deepspeed_cpu, digits, embedded_overrides, tmp_path, monkeypatch
):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="digits")
    for shard in sorted((digits / "train").glob("*.tar")):
        s3.upload_file(str(shard), "digits", f"train/{shard.name}")
    sizes = {
        path.name.replace("_stats.json", ".tar"): json.loads(path.read_text())["successes"]
        for path in (digits / "train").glob("*_stats.json")
    }
    s3.put_object(Bucket="digits", Key="train/sizes.json", Body=json.dumps(sizes).encode())
    overrides = [*embedded_overrides, *RUN, f"output_dir={tmp_path}", "name=run"]
    pattern = "data.train=['s3://digits/train/{00000..00007}.tar']"
    cache = f"data.cache.dir={tmp_path / 'cache'}"
    try:
        done = deepspeed_cpu(TRAIN, EMBEDDED, *overrides, pattern, cache)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        refused = deepspeed_cpu(TRAIN, EMBEDDED, *overrides, pattern, cache, "name=refused")
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    ours = records(tmp_path / "run")
    assert [[r[tag] for tag in EXACT] for r in ours] == [
        [r[tag] for tag in EXACT] for r in local_run
    ]
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"data\.train \(s3://digits.*\) cannot be reached: .*credentials", errors[0])
    assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run"]
