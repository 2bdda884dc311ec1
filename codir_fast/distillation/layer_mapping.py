"""Which teacher layer each student layer learns from. Layers count from 1: 0 is the embeddings."""

Pairs = list[tuple[int, int]]

NAMES = ("uniform", "official", "last")


def parse_layer_mapping(text: str) -> Pairs | None:
    """Pairs of a text like 1:4,2:8; None for a name that `layer_pairs` resolves.

    Raises:
        ValueError: neither a name nor pairs.
    """
    if text in NAMES:
        return None
    try:
        pairs = [(int(s), int(t)) for s, t in (pair.split(":") for pair in text.split(","))]
    except ValueError:
        raise ValueError(
            f"`layer_mapping` must be one of {NAMES} or pairs as 1:4,2:8, got {text!r}"
        ) from None
    return pairs


def layer_pairs(mapping: str, student_layers: int, teacher_layers: int) -> Pairs:
    """(student layer, teacher layer) for each compared pair, of n student and N teacher layers.

    uniform: i <- round(i N / n), as 2, 4, 6 for 3 of 6. official: i <- round((i - 1) N / n) + 1,
    the released code's 1, 3, 5. last: n <- N alone.

    Raises:
        ValueError: a layer that one side does not have.
    """
    n, N = student_layers, teacher_layers
    pairs = parse_layer_mapping(mapping)
    if pairs is None:
        if mapping == "last":
            return [(n, N)]
        if n > N:
            raise ValueError(
                f"`layer_mapping` {mapping} needs a student of at most {N} layers, the teacher's, "
                f"got {n}: give last or pairs as 1:4,2:8"
            )
        shift = 0 if mapping == "uniform" else 1
        return [(i, round((i - shift) * N / n) + shift) for i in range(1, n + 1)]
    for student, teacher in pairs:
        if not (1 <= student <= n and 1 <= teacher <= N):
            raise ValueError(
                f"`layer_mapping` must stay within {n} student and {N} teacher layers, "
                f"got {student}:{teacher}"
            )
    return pairs
