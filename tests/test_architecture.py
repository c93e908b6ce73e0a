"""Data flows one way: a module imports only from those before it in ORDER. The README's tree has the same order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = [
    "fcmae",
    "fcmae.atomic",
    "fcmae.tables",
    "fcmae.masking",
    "fcmae.networks",
    "fcmae.networks.spec",
    "fcmae.data",
    "fcmae.data.geometry",
    "fcmae.config.base",
    "fcmae.config",
    "fcmae.config.commands",
    "fcmae.options.fields",
    "fcmae.options.problems",
    "fcmae.options.files",
    "fcmae.options.help",
    "fcmae.options.line",
    "fcmae.options",
    "fcmae.completion",
    "fcmae.data.cores",
    "fcmae.processes",
    "fcmae.threads",
    "fcmae.timing",
    "fcmae.data.source",
    "fcmae.data.storage",
    "fcmae.data.tables",
    "fcmae.data.shards",
    "fcmae.data.index",
    "fcmae.data.walk",
    "fcmae.data.find",
    "fcmae.data.split",
    "fcmae.data.normalize",
    "fcmae.data.arrays",
    "fcmae.data.limits",
    "fcmae.data.dicom",
    "fcmae.data.tiff",
    "fcmae.data.readers",
    "fcmae.data.rasters",
    "fcmae.data.maps",
    "fcmae.data.decode",
    "fcmae.data.augment",
    "fcmae.data.sampler",
    "fcmae.data.bad_files",
    "fcmae.data.stats",
    "fcmae.data.survey",
    "fcmae.data.dataset",
    "fcmae.data.loader",
    "fcmae.choices",
    "fcmae.layouts.norms",
    "fcmae.layouts.sites",
    "fcmae.layouts.attention",
    "fcmae.layouts.native",
    "fcmae.layouts.masked",
    "fcmae.layouts.dense",
    "fcmae.layouts.packed",
    "fcmae.layouts.triton",
    "fcmae.layouts.minkowski",
    "fcmae.layouts",
    "fcmae.networks.encoder",
    "fcmae.networks.layers",
    "fcmae.networks.convnext",
    "fcmae.networks.container",
    "fcmae.networks.roadmap",
    "fcmae.networks.build",
    "fcmae.masked",
    "fcmae.heads",
    "fcmae.anytime",
    "fcmae.weights",
    "fcmae.weights.tensors",
    "fcmae.training",
    "fcmae.training.micro_batches",
    "fcmae.training.optim",
    "fcmae.training.records",
    "fcmae.training.own_files",
    "fcmae.training.checkpoint",
    "fcmae.training.health",
    "fcmae.training.messages",
    "fcmae.training.signals",
    "fcmae.training.launch",
    "fcmae.training.run",
    "fcmae.training.compiling",
    "fcmae.training.log",
    "fcmae.training.session",
    "fcmae.training.steps",
    "fcmae.weights.formats",
    "fcmae.weights.record",
    "fcmae.weights.directories",
    "fcmae.weights.files",
    "fcmae.weights.convert",
    "fcmae.weights.segmenters",
    "fcmae.provenance",
    "fcmae.weights.onnx",
    "fcmae.starting",
    "fcmae.classification",
    "fcmae.segmentation",
    "fcmae.evaluation",
    "fcmae.evaluation.pictures",
    "fcmae.evaluation.models",
    "fcmae.evaluation.features",
    "fcmae.evaluation.probes",
    "fcmae.evaluation.analysis",
    "fcmae.evaluation.monitor",
    "fcmae.pretraining",
    "fcmae.finetuning",
    "fcmae.segmenting",
    "fcmae.prediction",
    "fcmae.evaluation.outputs",
    "fcmae.pruning",
    "fcmae.evaluation.records",
    "fcmae.evaluation.evaluate",
    "fcmae.evaluation.embed",
    "fcmae.evaluation.figures",
    "fcmae.evaluation.analyze",
    "fcmae.evaluation.charts",
    "fcmae.evaluation.runs",
    "fcmae.evaluation.verdicts",
    "fcmae.evaluation.paired",
    "fcmae.evaluation.status",
    "fcmae.evaluation.report",
    "fcmae.hub",
    "fcmae.roadmap",
    "fcmae.verify",
    "fcmae.bench",
    "fcmae.planning",
    "fcmae.worth",
    "fcmae.doctor",
    "fcmae.api",
    "fcmae.cli",
]

# They take plain arguments or finished parts; a configuration is translated once, in the loops.
NUMERICAL = (
    "masking",
    "data",
    "layouts",
    "networks",
    "masked",
    "heads",
    "anytime",
    "weights.formats",
    "training.optim",
    "evaluation.pictures",
    "classification",
    "segmentation",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "fcmae").rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fcmae")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            if base.split(".")[0] == "fcmae":
                names = (f"{base}.{alias.name}" for alias in node.names)
                yield from (name if name in MODULES else base for name in names)


def test_every_module_has_a_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(MODULES)


# The package itself is a door: it loads what it offers on use.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "fcmae"])
def test_imports_point_back_along_the_flow_of_data(name: str) -> None:
    later = [found for found in imports(MODULES[name]) if ORDER.index(found) >= ORDER.index(name)]
    assert not later, f"{name} imports {later}, which come after it"


@pytest.mark.parametrize("name", [n for n in MODULES if n.removeprefix("fcmae.").startswith(NUMERICAL)])
def test_numerical_modules_know_no_configuration(name: str) -> None:
    assert not [found for found in imports(MODULES[name]) if found.startswith(("fcmae.config", "fcmae.options"))]
