"""docs/: every row of "Replacing your loss" runs, and both sides give the same numbers."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import originals
import peers
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "replacing-your-loss.md"
ROW = re.compile(r"^\| (?P<source>[^|]+) \| `(?P<original>[^|]+)` \| `(?P<ours>[^|]+)` \|$", re.M)
ROWS = [match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
B, M, K, D = 8, 5, 30, 16


def halved_crd(opt):
    """The released CoDIR code: RepDistiller's, and half of its sum."""
    criterion = originals.CRDLoss(opt)
    return lambda *batch: criterion(*batch) / 2


def originals_of(package: str) -> dict[str, object]:
    """The names that an original call of this package needs."""
    if package == "info-nce-pytorch":
        return vars(peers.info_nce_pytorch())
    if package == "pytorch-metric-learning":
        return {"losses": peers.pytorch_metric_learning()}
    formulas = {
        "PyTorch": {},
        "SimCLR notebook": {"info_nce_of_views": originals.info_nce_of_views},
        "lightly": {"NTXentLoss": originals.LightlyNTXentLoss},
        "RepDistiller": {"CRDLoss": originals.CRDLoss},
        "CoDIR": {"CRDLoss": halved_crd},
        "MoCo": {},
        "open_clip": {"ClipLoss": originals.ClipLoss},
        "sentence-transformers": {
            "MultipleNegativesRankingLoss": originals.MultipleNegativesRankingLoss
        },
    }
    return formulas[package]


def variables() -> tuple[dict[str, object], list[torch.Tensor]]:
    """What the page says its names stand for, and those of them that require a gradient."""
    names = ("q", "p", "hard", "view0", "view1", "image_features", "text_features", "f_s", "f_t")
    tensors = {name: torch.randn(B, D) for name in names}
    tensors |= {"negatives": torch.randn(K, D), "own_negatives": torch.randn(B, M, D)}
    tensors["logit_scale"] = torch.tensor(10.0)
    for tensor in tensors.values():
        tensor.requires_grad_()
    opt = dict(s_dim=D, t_dim=D, feat_dim=12, n_data=K, nce_k=M, nce_t=0.07, nce_m=0.5)
    idx = torch.randperm(K)[:B]
    k = torch.randn(B, D)
    others = {
        "t": 0.2,
        "target": torch.arange(B),
        "first": torch.zeros(B, dtype=torch.int64),
        "labels": torch.arange(B) // 2,
        "negative_labels": torch.arange(K) % 5,
        "index": torch.randint(0, K, (B, M)),
        "mined": torch.randint(0, B, (3, 20)).unbind(),
        "opt": SimpleNamespace(**opt),
        "idx": idx,
        "contrast_idx": torch.cat([idx[:, None], torch.randint(0, K, (B, M))], dim=1),
        "moco": originals.MoCo(D, K),
        "im_q": tensors["q"],
        "im_k": k,
        "k": k,
        "model": lambda embeddings: {"sentence_embedding": embeddings},
        "a": tensors["q"],
        "b": tensors["p"],
        "c": tensors["hard"],
    }
    return {**tensors, **others}, list(tensors.values())


def result(call: str, names: dict[str, object], inputs: list[torch.Tensor]):
    torch.manual_seed(1)  # some start from random banks or weights
    loss = eval(call, dict(names))
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.detach(), [torch.zeros(()) if g is None else g for g in gradients]


def preamble() -> dict[str, object]:
    """The imports that the page gives."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code
    names: dict[str, object] = {"torch": torch, "F": F}
    exec(code[1], names)
    return names


def python_block(page: Path) -> str:
    """The one Python block of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return code


@pytest.mark.parametrize(
    ("page", "launcher"),
    [
        ("README.md", ()),
        ("docs/scaling.md", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")),
    ],
)
def test_the_pages_program_runs_as_it_stands(page, launcher, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(python_block(ROOT / page), encoding="utf-8")
    command = [sys.executable, *launcher, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


def test_enough_rows():
    assert len(ROWS) >= 12 and len({source for source, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("source", "original", "ours"), ROWS, ids=[row[0] for row in ROWS])
def test_replacing_your_loss(source, original, ours):
    values, inputs = variables()
    names = preamble() | values
    got = result(ours, names, inputs)  # first: MoCo's call ends with writing to its queue
    expected = result(original, names | originals_of(source.split(",")[0]), inputs)
    torch.testing.assert_close(got, expected)
    assert any(gradient.any() for gradient in got[1])


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for link, anchor in links:
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_every_page_is_linked():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name in text, page
