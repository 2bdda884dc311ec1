"""codir_fast.compat.CRDLoss and ContrastMemory beside the formulas of RepDistiller."""

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import originals
import pytest
import torch
import torch.nn.functional as F
from originals import assert_same

from codir_fast.compat import ContrastMemory, CRDLoss

B, N, K, D = 6, 40, 15, 9
OPT = SimpleNamespace(s_dim=11, t_dim=7, feat_dim=D, n_data=N, nce_k=K, nce_t=0.07, nce_m=0.5)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def both(dtype, **changes):
    """Ours and the original, in the same state."""
    opt = SimpleNamespace(**{**vars(OPT), **changes})
    ours, original = CRDLoss(opt), originals.CRDLoss(opt)
    original.student, original.teacher = (
        copy.deepcopy(embed.linear) for embed in (ours.embed_s, ours.embed_t)
    )
    ours, original = ours.to(dtype), original.to(dtype)
    original.memories = [ours.contrast.memory_v1.clone(), ours.contrast.memory_v2.clone()]
    original.opt.nce_t = float(ours.contrast.params[1])  # 0.07 in float32, as in the original
    return ours, original


def batch(dtype=torch.float32, rows=B):
    f_s = torch.randn(rows, OPT.s_dim, dtype=dtype, requires_grad=True)
    f_t = torch.randn(rows, OPT.t_dim, dtype=dtype, requires_grad=True)
    idx = torch.randperm(N)[:rows]
    contrast_idx = torch.cat([idx[:, None], torch.randint(0, N, (rows, K))], dim=1)
    return f_s, f_t, idx, contrast_idx


def test_state_and_start():
    torch.manual_seed(3)
    memory = ContrastMemory(D, N, K)
    torch.manual_seed(3)
    bound = 1 / math.sqrt(D / 3)
    assert list(memory.state_dict()) == ["params", "memory_v1", "memory_v2"]
    for rows in (memory.memory_v1, memory.memory_v2):
        torch.testing.assert_close(rows, (2 * torch.rand(N, D) - 1) * bound)
    torch.testing.assert_close(memory.params, torch.tensor([K, 0.07, -1, -1, 0.5]))
    assert list(CRDLoss(OPT).state_dict()) == [
        "embed_s.linear.weight",
        "embed_s.linear.bias",
        "embed_t.linear.weight",
        "embed_t.linear.bias",
        "contrast.params",
        "contrast.memory_v1",
        "contrast.memory_v2",
    ]


@DTYPES
@pytest.mark.parametrize("changes", [{}, {"nce_t": 0.3, "nce_m": 0.9}], ids=str)
def test_loss_over_many_steps(changes, dtype):
    ours, original = both(dtype, **changes)
    for _ in range(5):
        given = batch(dtype)
        weights = [*ours.embed_s.parameters(), *ours.embed_t.parameters()]
        their_weights = [*original.student.parameters(), *original.teacher.parameters()]
        loss, expected = ours(*given), original(*given)
        assert loss.shape == (1,)
        got = torch.autograd.grad(loss, [*given[:2], *weights], retain_graph=True)
        want = torch.autograd.grad(expected, [*given[:2], *their_weights], retain_graph=True)
        torch.testing.assert_close(got, want)
        assert_same(loss, expected, given[:2])
        torch.testing.assert_close(ours.contrast.memory_v1, original.memories[0])
        torch.testing.assert_close(ours.contrast.memory_v2, original.memories[1])
        for place in (2, 3):
            torch.testing.assert_close(ours.contrast.params[place], original.Z[place - 2])


@DTYPES
def test_probabilities_over_many_steps(dtype):
    memory = ContrastMemory(D, N, K).to(dtype)
    original = originals.CRDLoss(OPT)
    original.opt = SimpleNamespace(**{**vars(OPT), "nce_t": float(memory.params[1])})
    original.memories = [memory.memory_v1.clone(), memory.memory_v2.clone()]
    for _ in range(4):
        *_, y, idx = batch()
        v = [F.normalize(torch.randn(B, D, dtype=dtype), dim=1).requires_grad_() for _ in range(2)]
        outputs = memory(*v, y, idx)
        for side in (0, 1):
            expected = original.probabilities(v[side], original.memories[1 - side], idx, side)
            assert outputs[side].shape == (B, K + 1, 1)
            assert_same(outputs[side], expected[:, :, None], [v[side]])
        for side in (0, 1):
            original.update(original.memories[side], y, v[side])
            rows = (memory.memory_v1, memory.memory_v2)[side]
            torch.testing.assert_close(rows, original.memories[side])


def test_negatives_are_drawn_from_all_rows():
    memory = ContrastMemory(D, 5, 2000)
    y = torch.tensor([3, 1])
    rows = memory.choose_rows(y, None)
    assert torch.equal(rows[:, 0], y) and rows.shape == (2, 2001)
    counts = torch.bincount(rows[:, 1:].flatten(), minlength=5)
    assert len(counts) == 5 and (counts - 800).abs().max() < 120
    torch.manual_seed(0)
    first = memory.choose_rows(y, None)
    torch.manual_seed(0)
    assert torch.equal(memory.choose_rows(y, None), first)


def test_drawn_negatives_train():
    criterion = CRDLoss(OPT)
    f_s, f_t, idx, _ = batch()
    loss = criterion(f_s, f_t, idx)
    loss.backward()
    assert loss.shape == (1,) and loss.isfinite() and f_s.grad.isfinite().all()


def test_eval_mode_changes_nothing():
    ours, original = both(torch.float32)
    before = copy.deepcopy(ours.state_dict())
    given = batch()
    assert_same(ours.eval()(*given), original(*given), given[:2])
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_whole_state_resumes():
    criterion = CRDLoss(OPT)
    criterion(*batch())
    again = CRDLoss(OPT)
    again.load_state_dict(copy.deepcopy(criterion.state_dict()))
    given = batch()
    assert torch.equal(again(*given), criterion(*given))
    assert torch.equal(again.contrast.memory_v1, criterion.contrast.memory_v1)


def test_loaded_params_count():
    criterion = CRDLoss(OPT)
    state = criterion.state_dict()
    state["contrast.params"] = torch.tensor([K, 0.5, 60.0, 50.0, 0.5])
    criterion.load_state_dict(state)
    other, original = both(torch.float32, nce_t=0.5)
    other.load_state_dict(state)
    original.Z = [60.0, 50.0]
    original.memories = [criterion.contrast.memory_v1.clone(), criterion.contrast.memory_v2.clone()]
    original.student, original.teacher = criterion.embed_s.linear, criterion.embed_t.linear
    given = batch()
    assert_same(criterion(*given), original(*given), given[:2])


def test_features_are_flattened():
    criterion = CRDLoss(OPT)
    f_s, f_t, idx, contrast_idx = batch()
    flat = copy.deepcopy(criterion)(f_s, f_t, idx, contrast_idx)
    assert torch.equal(criterion(f_s.view(B, 11, 1, 1), f_t.view(B, 7, 1), idx, contrast_idx), flat)


def test_low_temperature_stays_finite():
    """e^{s/T} / Z underflows to 0, whose logarithm the original takes."""
    ours, _ = both(torch.float32, nce_t=0.02)
    ours(*batch())
    with torch.no_grad():
        ours.contrast.params[2:4] = 1e38
    given = batch()
    loss = ours(*given)
    loss.backward()
    assert loss.isfinite() and given[0].grad.isfinite().all() and loss > 1


def test_autocast():
    criterion = CRDLoss(OPT)
    f_s, f_t, idx, contrast_idx = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(f_s, f_t, idx, contrast_idx)
    loss.backward()
    assert loss.dtype == torch.float32 and f_s.grad.isfinite().all()
    assert criterion.contrast.memory_v1.dtype == torch.float32


def test_nothing_of_the_size_of_the_gathered_rows_is_kept():
    opt = SimpleNamespace(**{**vars(OPT), "n_data": 500, "nce_k": 400, "feat_dim": 32})
    criterion = CRDLoss(opt)
    f_s, f_t, *_ = batch()
    sizes: list[int] = []

    def keep_size(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep_size, lambda saved: saved):
        criterion(f_s, f_t, torch.arange(B)).backward()
    assert max(sizes) <= 500 * 32 < B * 401 * 32


def test_refusals():
    memory, v = ContrastMemory(D, N, K), torch.randn(B, D)
    y = torch.arange(B)
    with pytest.raises(ValueError, match=re.escape("`idx` must have shape (B, K + 1) with B=6, K")):
        memory(v, v, y, torch.zeros(B, K, dtype=torch.int64))
    with pytest.raises(TypeError, match="`y` must be of an integer dtype"):
        memory(v, v, y.float())
    with pytest.raises(ValueError, match="`y` must have at least one row"):
        memory(v[:0], v[:0], y[:0])
    with pytest.raises(ValueError, match=re.escape("`y` must be in [0, 40), got 40")):
        memory(v, v, y + 35)
    rows = torch.zeros(B, K + 1, dtype=torch.int64)
    f_s, f_t, *_ = batch()
    for wrong, error, message in (
        (rows[:, 1:], ValueError, "`contrast_idx` must have shape (B, K + 1) with B=6, K=15"),
        (rows.float(), TypeError, "`contrast_idx` must be of an integer dtype"),
        (rows - 1, ValueError, "`contrast_idx` must be in [0, 40), got -1"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            CRDLoss(OPT)(f_s, f_t, y, wrong)
    with pytest.raises(ValueError, match=re.escape("`idx` must be in [0, 40), got 40")):
        CRDLoss(OPT)(f_s, f_t, y + 35)
    with pytest.raises(ValueError, match="`K` must be at least 1"):
        ContrastMemory(D, N, 0)
    with pytest.raises(AttributeError, match="nce_m"):
        CRDLoss(SimpleNamespace(**{k: v for k, v in vars(OPT).items() if k != "nce_m"}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v1": torch.ones(B)}, ValueError, "`v1` must have shape (B, D) with B=6 as `y`, D="),
        ({"v2": torch.ones(B - 1, D)}, ValueError, "`v2` must have shape (B, D) with B=6 as `y`"),
        ({"v2": torch.ones(B, D + 1)}, ValueError, "`v2` must have shape (B, D) with B=6 as `y`"),
        ({"v1": torch.ones(B, D).long()}, TypeError, "`v1` must be float32, float64, bfloat16"),
        ({"v2": torch.ones(B, D).half()}, ValueError, "`v2` must have the dtype of `memory_v1`"),
        ({"v1": [1.0]}, TypeError, "`v1` must be a Tensor, got list"),
        ({"y": torch.tensor(1)}, ValueError, "`y` must have shape (B,)"),
        ({"y": [1]}, TypeError, "`y` must be a Tensor, got list"),
        ({"idx": [1]}, TypeError, "`idx` must be a Tensor, got list"),
    ],
    ids=str,
)
def test_wrong_vectors_change_nothing(changes, error, message):
    memory = ContrastMemory(D, N, K)
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    given = {"v1": torch.randn(B, D), "v2": torch.randn(B, D), "y": torch.arange(B), **changes}
    with pytest.raises(error, match=re.escape(message)):
        memory(**given)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"T": -1}, ValueError, "`T` must be positive and finite, got -1"),
        ({"T": 0.0}, ValueError, "`T` must be positive and finite, got 0.0"),
        ({"T": "1"}, TypeError, "`T` must be a number, got str"),
        ({"momentum": 7.0}, ValueError, "`momentum` must be in [0, 1], got 7.0"),
        ({"momentum": math.nan}, ValueError, "`momentum` must be in [0, 1], got nan"),
        ({"momentum": True}, TypeError, "`momentum` must be a number, got bool"),
        ({"inputSize": 1.5}, TypeError, "`inputSize` must be an int, got float"),
    ],
    ids=str,
)
def test_settings_are_checked_at_construction(changes, error, message):
    given = {"inputSize": D, "outputSize": N, "K": K, **changes}
    with pytest.raises(error, match=re.escape(message)):
        ContrastMemory(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nce_t": -1}, "`opt.nce_t` must be positive and finite, got -1"),
        ({"nce_m": 7.0}, "`opt.nce_m` must be in [0, 1], got 7.0"),
        ({"feat_dim": 0}, "`opt.feat_dim` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_options_are_checked_by_their_names(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CRDLoss(SimpleNamespace(**{**vars(OPT), **changes}))


def test_options_of_numpy():
    changes = {"feat_dim": np.int64(D), "nce_t": np.float32(0.07), "nce_m": np.float64(0.5)}
    memory = CRDLoss(SimpleNamespace(**{**vars(OPT), **changes})).contrast
    assert torch.equal(memory.params, ContrastMemory(D, N, K, 0.07, 0.5).params)


def test_features_are_named():
    f_s, f_t, idx, _ = batch()
    for given, message in (
        (
            (f_s[:3], f_t, idx),
            "`f_s` must have shape (B, 11), or one that flattens to it, with B=6",
        ),
        ((f_s, f_s, idx), "`f_t` must have shape (B, 7), or one that flattens to it, with B=6"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            CRDLoss(OPT)(*given)
