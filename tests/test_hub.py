from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import transformers
from conftest import randomize
from huggingface_hub import ModelCard
from reported import evaluation, finetune_run, pretrain_run
from safetensors.torch import load_file

import fcmae
from fcmae import options
from fcmae.cli import main
from fcmae.config import SegmentConfig, SegmentData, SegmentModel
from fcmae.data.index import Images
from fcmae.evaluation.runs import read_run
from fcmae.heads import Classifier
from fcmae.hub import card
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ContainerSpec, ConvNeXtSpec
from fcmae.weights.convert import build_classifier, save_classifier
from fcmae.weights.files import read_weights
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

SPEC = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16))
IMAGE = ImageRecord(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=(3, 64, 64), crop_pct=1.0)
NAMES = ("cat", "do|g", "<b>ünï")


def write_model(dest: Path, spec: ConvNeXtSpec = SPEC, license_: str | None = "cc-by-nc-4.0") -> Path:
    """A classifier as a run leaves it in best/."""
    model = Classifier(Encoder(spec), len(NAMES))
    randomize(model)
    origin = {"license": license_} if license_ else {}
    save_classifier(dest, model, Weights({}, Architecture(spec), IMAGE, NAMES, origin))
    return dest


# huggingface_hub's own, of its network library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A fine-tuning run with its best model and an evaluation."""
    path = finetune_run(tmp_path / "secret place" / "cells", 0.8)
    write_model(path / "best")
    return path


# The repository


def test_a_repository_is_loaded_by_timm_transformers_and_fcmae_as_its_card_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "page", "--to", "hub"]) == 0
    assert "page/README.md: read it before you publish it" in capsys.readouterr().out
    assert sorted(path.name for path in Path("page").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "The best checkpoint is chosen by these scores" in Path("page/README.md").read_text()
    found: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", Path("page/README.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, found)
        found[found["model"].__class__.__module__.partition(".")[0]] = found["model"].eval()
    images = torch.rand(2, 3, 64, 64)
    expected = build_classifier(read_weights(run)).eval()(images)
    torch.testing.assert_close(found["timm"](images), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["transformers"](images).logits, expected, rtol=1e-3, atol=1e-3)
    assert found["transformers"].config.id2label == dict(enumerate(NAMES))
    assert isinstance(found["processor"], transformers.ImageProcessingMixin)
    torch.testing.assert_close(found["encoder"].normalize.mean.flatten(), torch.tensor(IMAGE.mean))
    assert isinstance(found["timm"], timm.models.ConvNeXt)


def test_no_processor_that_divides_by_255_is_named_for_what_may_have_learnt_16_bits(run: Path) -> None:
    weights = read_weights(run)
    deep = replace(weights, image=IMAGE.model_copy(update={"mean": (0.1, 0.1, 0.1)}))
    named = ["AutoImageProcessor" in card(each, None, "hf-hub:me/cells") for each in (weights, deep)]
    assert named == [True, False]


def test_the_card_says_what_the_run_says_and_not_where_it_lies(run: Path, tmp_path: Path) -> None:
    text = card(read_weights(run), read_run(run, "cells"), "hf-hub:me/cells")
    read = ModelCard(text)
    assert read.data.to_dict() == {
        "license": "cc-by-nc-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["fcmae", "convnext"],
    }
    for wanted in ("# cells", "timm.create_model('hf-hub:me/cells', pretrained=True)", "snapshot_download('me/cells')"):
        assert wanted in text
    assert Images.load(run / "files.json").fingerprint() in text
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{last['epoch']:.4g} epochs, {last['step']:,} steps" in text
    assert "cc-by-nc-4.0: that of the weights that it was made from" in text
    assert r"cat, do\|g, \<b\>ünï" in text
    assert "secret place" not in text and str(tmp_path) not in text
    places = {"data.maps": "/me/maps", "data.val_maps": "/me/maps", "monitor.labelled": "/me/labels"}
    assert "/me/" not in card(read_weights(run), replace(read_run(run, "cells"), changed=places), "hf-hub:me/cells")


def test_the_card_is_of_the_step_and_the_average_that_are_published(run: Path) -> None:
    weights, found = read_weights(run), read_run(run, "cells")
    lines = [{"step": step, "epoch": step / 2, "top1": step / 8, "ema_top1": step / 32} for step in (1, 2, 4)]
    text = card(replace(weights, origin={"step": 2}), replace(found, lines=lines), "hf-hub:me/cells")
    assert "1 epochs, 2 steps" in text and "0.0625" in text and "0.125" not in text and "ema_top1" in text


def test_the_card_of_a_pretraining_has_its_curves_and_probes(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "first")
    evaluation(path / "evaluation", str(path), 0.87)
    evaluation(path / "evaluation" / "untrained", f"random:{path}", 0.55)
    found = read_run(path, "first")
    weights = Weights({}, Architecture(VARIANTS["convnextv2_atto"]), IMAGE)
    text = card(weights, found, "local-dir:first")
    assert "An encoder: convnextv2\\_atto" in text
    assert "masked pretraining" in text and "val_loss" in text
    assert (
        "What its features tell" in text
        and "| linear | 4 | this | - | 0.870 |" in re.sub(" +", " ", text)
        and "untrained" in text
    )
    assert "Whoever publishes this names one" in text
    assert ModelCard(text).data.license is None


def test_the_card_tells_whose_features_the_probes_are_of(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "first")
    for name, model, stage, step in (
        ("first", str(path), 4, 10),
        ("random", f"random:{path}", 4, None),
        ("pixels", "pixels:32", None, None),
        ("other", "runs/other", 4, 60),
    ):
        evaluation(path / "evaluation" / name, model, 0.8, stage=stage)
        file = path / "evaluation" / name / "evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": step}))
    text = card(Weights({}, Architecture(VARIANTS["convnextv2_atto"]), IMAGE), read_run(path, "first"), "local-dir:f")
    rows = re.findall(r"\| linear +\| +(\S+) +\| +([^|]+?) +\|", text)
    assert sorted(rows) == [("-", "pixels:32"), ("4", "this run, at step 10"), ("4", "untrained")]


def test_scores_of_another_step_or_on_other_images_are_not_told_as_those_of_the_model(run: Path) -> None:
    for name, step, num in (("best", 2, 400), ("last", 4, 400), ("other", 4, 300)):
        evaluation(run / "evaluation" / name, str(run), 0.8)
        file = run / "evaluation" / name / "evaluation.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"step": step, "data": found["data"] | {"num_test": num}}))
    text = card(replace(read_weights(run), origin={"step": 4}), read_run(run, "cells"), "local-dir:f")
    tables = text.partition("What its features tell")[2].split("told them apart on ")[1:]
    rows = [re.findall(r"\| linear +\| +4 +\| +([^|]+?) +\|", part) for part in tables]
    assert [part[:3] for part in tables] == ["400", "300"]
    assert rows == [["this run, at step 2", "this"], ["this"]]


def test_a_pruned_model_has_no_scores_of_the_network_before(run: Path) -> None:
    weights = replace(read_weights(run), origin={"pruned": "0.5 of channels kept"})
    text = card(weights, read_run(run, "cells"), "local-dir:f")
    assert "It was pruned (0.5 of channels kept), and has not been trained since." in text
    assert "How it was trained" not in text and "What its features tell" not in text


@pytest.mark.parametrize(("said", "written"), [("MIT", ("mit", None)), ("my own", ("other", "my own"))])
def test_a_licence_is_named_as_the_hub_names_it(said: str, written: tuple[str, str | None]) -> None:
    weights = Weights({}, Architecture(SPEC), IMAGE, origin={"license": said})
    read = ModelCard(card(weights, None, "hf-hub:me/it")).data
    assert (read.license, read.license_name) == written


def test_the_card_of_a_network_that_timm_does_not_have_names_fcmae_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", ConvNeXtSpec(depths=(1, 1), dims=(8, 8)))
    (tmp_path / "config.yaml").write_text("of: somebody else\n")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "page"), "--to", "hub"]) == 0
    text = (tmp_path / "page" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "fcmae"
    assert "import timm" not in text and "import transformers" not in text
    assert "How it was trained" not in text and str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], {})


def test_settings_of_onnx_are_refused_for_a_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "y", "--to", "hub", "--normalize"]) == 2
    assert "normalize: it is of ONNX files: leave it out for hub" in capsys.readouterr().err


# The hub


class Hub(BaseHTTPRequestHandler):
    """The endpoints by which a repository is made and filled."""

    repos: dict[str, dict[str, bytes]]
    refuses: dict[str, tuple[int, str]]  # by a part of the path
    visibility: dict[str, Any]

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if (refused := next((r for part, r in self.refuses.items() if part in self.path), None)) is not None:
            return self.answer({"error": refused[1], "errors": [{"message": refused[1]}]}, refused[0])
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name in self.repos:
                return self.answer({"error": "You already created this model repo", "url": f"{url}/{name}"}, 409)
            self.repos[name], self.visibility[name] = {}, asked.get("private", asked.get("visibility"))
            return self.answer({"url": f"{url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            assert json.loads(content)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{url}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)
        assert match, self.path
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[match[1]][value["path"]] = self.repos["lfs"][value["oid"]]
        return self.answer({"commitUrl": f"{url}/{match[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me"})
        name = self.path.removeprefix("/api/models/")
        if name not in self.repos:  # the client may ask for more, by what it finds in the environment
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"id": name, "private": self.visibility.get(name) in (True, "private"), "siblings": []})

    def do_PUT(self) -> None:
        if (refused := self.refuses.get("PUT")) is not None:
            return self.answer({"error": refused[1]}, refused[0])
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.repos.setdefault("lfs", {})[self.path.rpartition("/")[2]] = content
        return self.answer({})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in for the hub, to which the client of this process speaks."""
    handler = type("Handler", (Hub,), {"repos": {}, "refuses": {}, "visibility": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a storage of its own
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield handler
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


def test_a_pushed_model_is_private_and_comes_back_as_it_was(
    run: Path, hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/cells"]) == 0
    assert re.search(r"pushed to http://127.+/me/cells: private$", capsys.readouterr().out.strip())
    assert hub.visibility["me/cells"] in (True, "private")
    files = hub.repos["me/cells"]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(run / "best" / "model.safetensors").keys()
    assert read_weights(tmp_path).class_names == NAMES
    assert "timm.create_model('hf-hub:me/cells'" in files["README.md"].decode()


def test_a_name_alone_is_of_whom_the_token_is_of_on_the_card_too(run: Path, hub: type[Hub]) -> None:
    assert main(["push", str(run), "cells"]) == 0
    text = hub.repos["me/cells"]["README.md"].decode()
    assert "timm.create_model('hf-hub:me/cells'" in text and "snapshot_download('me/cells')" in text


def test_a_name_alone_without_a_token_is_a_sentence(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    assert main(["push", str(run), "cells"]) == 2
    assert "repo = cells: the hub at" in (said := capsys.readouterr().err) and "log in with `hf auth login`" in said


def test_a_repository_that_is_there_is_added_to_only_if_asked(
    run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/cells"] = {"README.md": b"mine"}
    assert main(["push", str(run), "me/cells"]) == 2
    assert "give another name, or --overwrite to add to it" in capsys.readouterr().err
    assert hub.repos["me/cells"] == {"README.md": b"mine"}
    assert main(["push", str(run), "me/cells", "--overwrite"]) == 2  # it was made public, by hand perhaps
    assert "repo = me/cells is public: give --public, or make it private there" in capsys.readouterr().err
    assert hub.repos["me/cells"] == {"README.md": b"mine"}
    assert main(["push", str(run), "me/cells", "--overwrite", "--public"]) == 0
    assert re.search("me/cells: public$", capsys.readouterr().out.strip())
    assert set(hub.repos["me/cells"]) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("refuses", "token", "sentence"),
    [
        ({}, "hf_wrong", "log in with `hf auth login`, or set HF_TOKEN"),
        ({"/repos/create": (403, "no right")}, "hf_right", "use a token that may write there"),
        ({"/validate-yaml": (400, "license is no licence")}, "hf_right", "license is no licence"),
        ({"/commit/main": (413, "too large")}, "hf_right", "413"),
        ({"PUT": (403, "no room")}, "hf_right", "Error while uploading 'model.safetensors'"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(
    run: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refuses: dict[str, tuple[int, str]],
    token: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refuses.update(refuses)
    assert main(["push", str(run), "cells"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_hub_that_is_not_there_is_a_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/cells"]) == 2
    assert "repo = me/cells: the hub at http://127.0.0.1:9 refused" in capsys.readouterr().err


def test_a_name_that_no_repository_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "x", "a/b/c"]) == 2
    assert "repo: received a/b/c; give USER/NAME, of letters, digits, points, - and _" in capsys.readouterr().err


def test_what_is_written_names_no_place_of_the_run(run: Path, tmp_path: Path) -> None:
    model = read_weights(run / "best")
    origin = {"license": "mit", "run": str(run), "init": "/home/me/first", "step": 9}
    save_classifier(run / "best", build_classifier(model), replace(model, origin=origin))
    assert main(["export", str(run), str(tmp_path / "page"), "--to", "hub"]) == 0
    found = read_weights(tmp_path / "page").origin
    assert found["license"] == "mit" and found["step"] == 9 and not {"run", "init"} & set(found)
    for path in (tmp_path / "page").iterdir():
        assert b"secret place" not in path.read_bytes() and b"/home/me" not in path.read_bytes()


def test_a_segmentation_is_refused_in_a_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = SegmentData(path="images", maps="maps"), SegmentModel(variant="convnextv2_atto")
    settings = options.dump(SegmentConfig(out=run, data=data, model=model))
    (run / "config.yaml").write_text(f"# fcmae segment {fcmae.__version__}\n{settings}")
    assert main(["export", str(run), str(tmp_path / "page"), "--to", "hub"]) == 2
    assert "makes label maps, and no format of the hub holds its head" in capsys.readouterr().err
    (run / "best" / "head.safetensors").touch()  # a copy, in no run
    shutil.copytree(run / "best", tmp_path / "copy")
    assert main(["export", str(tmp_path / "copy"), str(tmp_path / "page"), "--to", "hub"]) == 2
    assert "makes label maps, and no format of the hub holds its head" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_the_card_of_another_network_does_not_call_it_a_convnext() -> None:
    container = ContainerSpec(depths=(1, 1), dims=(16, 32), affinity=("static", "mixed"), mlp_ratios=(4, 4))
    for spec, is_masked in ((container, True), (VARIANTS["roadmap/resnet"], False)):
        text = card(Weights({}, Architecture(spec), IMAGE), None, "local-dir:f")
        assert ModelCard(text).data.tags == ["fcmae"] and ("masked pretraining of ConvNets" in text) == is_masked
