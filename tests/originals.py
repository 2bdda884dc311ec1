"""What other libraries compute, written out from their papers and documentation in eager PyTorch:
the other side of the tests of codir_fast.compat and of docs/replacing-your-loss.md for packages
that are not installed, and a second one for those that are.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def assert_same(ours: Tensor, original: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients under a random upstream gradient."""
    torch.testing.assert_close(ours, original)
    upstream = torch.randn_like(original)
    got, expected = (
        torch.autograd.grad(loss, inputs, upstream, retain_graph=True) for loss in (ours, original)
    )
    torch.testing.assert_close(got, expected)


def info_nce(q: Tensor, p: Tensor, negatives: Tensor | None, t: float) -> Tensor:
    """-log softmax of the positive's cosine similarity, (B,); negatives (B, M, D) or (K, D)."""
    q, p = F.normalize(q, dim=1), F.normalize(p, dim=1)
    if negatives is None:
        return F.cross_entropy(q @ p.T / t, torch.arange(len(q)), reduction="none")
    negatives = F.normalize(negatives, dim=-1)
    if negatives.ndim == 2:
        negatives = negatives.expand(len(q), -1, -1)
    candidates = torch.cat([p[:, None], negatives], dim=1)
    return -torch.einsum("bd,bmd->bm", q, candidates).div(t).log_softmax(1)[:, 0]


def simclr(view0: Tensor, view1: Tensor, t: float = 0.5) -> Tensor:
    """SimCLR, eq. 1, averaged over the 2 B views."""
    B = len(view0)
    z = F.normalize(torch.cat([view0, view1]), dim=1)
    logits = (z @ z.T / t).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * B).roll(B))


class LightlyNTXentLoss:
    """lightly's loss. Its bank: random unit rows at first; keys enter after the loss, where the
    queries require a gradient; a batch that reaches the end is cut there.
    """

    def __init__(self, temperature: float = 0.5, memory_bank_size: tuple[int, ...] = (0,)):
        self.temperature, self.pointer, self.bank = temperature, 0, None
        if memory_bank_size[0] > 0:
            self.bank = F.normalize(torch.randn(*memory_bank_size), dim=1)

    def __call__(self, view0: Tensor, view1: Tensor) -> Tensor:
        if self.bank is None:
            return simclr(view0, view1, self.temperature)
        loss = info_nce(view0, view1, self.bank.to(view0.dtype), self.temperature).mean()
        if view0.requires_grad:
            self._write(F.normalize(view1.detach(), dim=1))
        return loss

    def _write(self, keys: Tensor) -> None:
        kept = keys[: len(self.bank) - self.pointer]
        self.bank[self.pointer : self.pointer + len(kept)] = kept
        end = self.pointer + len(keys)
        self.pointer = 0 if end >= len(self.bank) else end


def nt_xent(
    embeddings: Tensor,
    labels: Tensor,
    t: float,
    rows: Tensor | None = None,
    row_labels: Tensor | None = None,
    own_row: Tensor | None = None,
) -> Tensor:
    """pytorch-metric-learning's NTXentLoss, one positive pair after the other."""
    if rows is None:
        rows, row_labels, own_row = embeddings, labels, torch.arange(len(labels))
    logits = F.normalize(embeddings, dim=1) @ F.normalize(rows, dim=1).T / t
    losses = []
    for a, label in enumerate(labels):
        negatives = logits[a][row_labels != label]
        for p in torch.nonzero(row_labels == label)[:, 0]:
            if own_row is None or p != own_row[a]:
                losses.append(
                    torch.cat([logits[a, p, None], negatives]).logsumexp(0) - logits[a, p]
                )
    return torch.stack(losses).mean()


class CRDLoss(nn.Module):
    """RepDistiller: NCE of the student's embedding against the teacher's memory, and the reverse.
    Z is the mean of e^{s/t} over the first batch, times n.
    """

    def __init__(self, opt) -> None:
        super().__init__()
        self.opt = opt
        self.student = nn.Linear(opt.s_dim, opt.feat_dim)
        self.teacher = nn.Linear(opt.t_dim, opt.feat_dim)
        bound = (3 / opt.feat_dim) ** 0.5
        self.memories = [
            torch.empty(opt.n_data, opt.feat_dim).uniform_(-bound, bound) for _ in range(2)
        ]
        self.Z = [None, None]

    def probabilities(self, v: Tensor, memory: Tensor, rows: Tensor, side: int) -> Tensor:
        out = torch.exp((memory[rows] * v[:, None]).sum(2) / self.opt.nce_t)
        if self.Z[side] is None:
            self.Z[side] = out.detach().mean() * self.opt.n_data
        return out / self.Z[side]

    def one_way(self, P: Tensor) -> Tensor:
        c = (P.shape[1] - 1) / self.opt.n_data
        positive = P[:, 0] / (P[:, 0] + c + 1e-7)
        negative = c / (P[:, 1:] + c + 1e-7)
        return -(positive.log() + negative.log().sum(1)).mean()

    def update(self, memory: Tensor, rows: Tensor, v: Tensor) -> None:
        for row, vector in zip(rows.tolist(), v.detach(), strict=True):
            mixed = self.opt.nce_m * memory[row] + (1 - self.opt.nce_m) * vector
            memory[row] = mixed / mixed.norm()

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor) -> Tensor:
        v_s = F.normalize(self.student(f_s), dim=1)
        v_t = F.normalize(self.teacher(f_t), dim=1)
        of_student, of_teacher = self.memories
        loss = self.one_way(self.probabilities(v_s, of_teacher, contrast_idx, 0))
        loss = loss + self.one_way(self.probabilities(v_t, of_student, contrast_idx, 1))
        self.update(of_student, idx, v_s)
        self.update(of_teacher, idx, v_t)
        return loss[None]


class MoCo:
    """MoCo without its encoders: logits and targets of the loss, and the queue. Keys are the
    columns of `queue` (D, K), `queue_ptr` is the next to be overwritten.
    """

    def __init__(self, dim: int = 128, K: int = 65536, T: float = 0.07):
        self.T = T
        self.queue = F.normalize(torch.randn(dim, K), dim=0)
        self.queue_ptr = torch.zeros(1, dtype=torch.int64)

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = F.normalize(q, dim=1), F.normalize(k.detach(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.to(q.dtype)], dim=1)
        first = int(self.queue_ptr)
        self.queue = self.queue.clone()  # the logits' backward needs the old one
        self.queue[:, first : first + len(k)] = k.T
        self.queue_ptr[0] = (first + len(k)) % self.queue.shape[1]
        return logits / self.T, torch.zeros(len(q), dtype=torch.int64)


class ClipLoss:
    """open_clip's loss in a single process."""

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale, logit_bias=0
    ) -> Tensor:
        logits = logit_scale * image_features @ text_features.T + logit_bias
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class MultipleNegativesRankingLoss:
    """sentence-transformers' loss: anchors, positives, and hard negatives where there are."""

    def __init__(self, model: Callable[[Tensor], dict[str, Tensor]], scale: float = 20.0):
        self.model, self.scale = model, scale

    def __call__(self, sentence_features: Sequence[Tensor], labels: None) -> Tensor:
        anchors, *candidates = (self.model(x)["sentence_embedding"] for x in sentence_features)
        scores = F.cosine_similarity(anchors[:, None], torch.cat(candidates)[None], dim=2)
        return F.cross_entropy(scores * self.scale, torch.arange(len(anchors)))


def info_nce_of_views(features: Tensor, temperature: float = 0.07) -> Tensor:
    """The form of many SimCLR notebooks: features of two views one below the other, (2 B, D), the
    positive's logit moved into column 0.
    """
    B = len(features) // 2
    features = F.normalize(features, dim=1)
    similarity = features @ features.T
    image = torch.arange(B).repeat(2)
    same_image = image[:, None] == image
    itself = torch.eye(2 * B, dtype=torch.bool)
    positive = similarity[same_image & ~itself].view(2 * B, 1)
    negatives = similarity[~same_image].view(2 * B, -1)
    logits = torch.cat([positive, negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(2 * B, dtype=torch.int64))
