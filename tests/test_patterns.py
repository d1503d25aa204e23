"""patterns.py against nested loops over Python lists, and against the figures of the reference system."""
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import patterns  # noqa: E402

SPECIAL, CARD = 99, 7


# The obvious slow reference: a layout is a list over steps of lists of (frame, codebook). Frames >= T are
# overflow.

def slow_delay(T, delays):
    layout = [[]]
    for time_ in range(T + max(delays)):
        layout.append([(time_ - d, k) for k, d in enumerate(delays) if time_ - d >= 0])
    return layout


def slow_unrolled(T, flattening, delays):
    due = []
    for t in range(T + max(delays)):
        for inner in range(max(flattening) + 1):
            codebooks = [k for k in range(len(flattening)) if flattening[k] == inner]
            if not codebooks:
                due.append((t, []))
            elif t + delays[codebooks[0]] < T + max(delays):
                due.append((t + delays[codebooks[0]], [(t, k) for k in codebooks]))
    return [[]] + [coords for _, coords in sorted(due)]


def slow_valid(layout, T):
    tail = max(t for coords in layout for t, _ in coords) + 1 - T
    return len(layout) - tail


def slow_build(codes, layout, special):
    B, K, T = codes.shape
    seq = [[[special] * len(layout) for _ in range(K)] for _ in range(B)]
    for b, (s, coords) in itertools.product(range(B), enumerate(layout)):
        for t, k in coords:
            if t < T:
                seq[b][k][s] = int(codes[b, k, t])
    return torch.tensor(seq)


def slow_revert(seq, layout, K, T, fill):
    B, _, S = seq.shape
    codes, mask = torch.full((B, K, T), fill), torch.zeros(K, T, dtype=torch.bool)
    for s, coords in enumerate(layout[:S]):
        for t, k in coords:
            if t < T:
                codes[:, k, t], mask[k, t] = seq[:, k, s], True
    return codes, mask


STEREO = [0, 0, 1, 1, 2, 2, 3, 3]
DELAYS = [[0], [3], [0, 0], [0, 1], [1, 2], [0, 5], [0, 1, 2], [2, 2, 3], [0, 0, 4],
          [0, 1, 2, 3], [0, 1, 1, 6], STEREO]
UNROLLED = [([0], [0]), ([2], [1]), ([0, 1], [0, 0]), ([0, 1], [0, 3]), ([0, 0], [2, 2]), ([1, 1], [0, 0]),
            ([0, 1, 2], [0, 0, 0]), ([0, 1, 1], [0, 2, 2]), ([0, 2, 4], [0, 1, 1]), ([1, 3, 3], [1, 2, 2]),
            ([0, 1, 2, 3], [0, 0, 0, 0]), ([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 1, 1, 1], [0, 0, 0, 0]),
            ([0, 0, 3, 3], [0, 0, 2, 2]), ([0, 1, 1, 1], [0, 4, 4, 4]), ([0, 1, 2, 3], [1, 1, 1, 5]),
            (list(range(8)), STEREO), (STEREO, [0] * 8), (STEREO, STEREO)]
LENGTHS = [1, 2, 5, 12]
CASES = ([pytest.param("delay", d, None, id=f"delay-{d}") for d in DELAYS]
         + [pytest.param("parallel", [0] * K, None, id=f"parallel-{K}") for K in (1, 2, 4, 8)]
         + [pytest.param("unrolled", d, f, id=f"unrolled-{f}-{d}") for f, d in UNROLLED])


def made(name, T, delays, flattening):
    """The pattern of a case and its slow layout."""
    pattern = patterns.make_pattern(name, T, len(delays), None if name == "parallel" else delays, flattening)
    return pattern, slow_unrolled(T, flattening, delays) if name == "unrolled" else slow_delay(T, delays)


@pytest.mark.parametrize("name, delays, flattening", CASES)
def test_against_nested_loops(name, delays, flattening):
    for T in LENGTHS:
        pattern, layout = made(name, T, delays, flattening)
        K, S_valid = len(delays), slow_valid(layout, T)
        assert (pattern.K, pattern.T, pattern.S, pattern.S_valid) == (K, T, len(layout), S_valid)
        codes = torch.randint(CARD, (2, K, T))
        for steps, valid_only in ((S_valid, True), (len(layout), False)):
            seq = pattern.build(codes, SPECIAL, valid_only)
            assert torch.equal(seq, slow_build(codes, layout[:steps], SPECIAL))
            assert (seq[:, :, 0] == SPECIAL).all()
            for got, want in zip(pattern.revert(seq, -1), slow_revert(seq, layout, K, T, -1)):
                assert torch.equal(got, want)
        back, mask = pattern.revert(pattern.build(codes, SPECIAL, valid_only=False), -1)
        assert torch.equal(back, codes) and mask.all()
        for t in range(T):
            steps = [s for s, coords in enumerate(layout) if t in [c[0] for c in coords]]
            assert pattern.first_step(t) == min(steps)


@pytest.mark.parametrize("name, delays, flattening", CASES)
def test_layout_is_causal(name, delays, flattening):
    """A code comes after the earlier frames of its codebook, never before a lower codebook of its frame."""
    for T in LENGTHS:
        pattern, _ = made(name, T, delays, flattening)
        step = pattern.step
        assert (step > 0).all()
        assert (step.diff(dim=1) > 0).all()
        assert (step.diff(dim=0) >= 0).all()
        assert torch.equal(pattern.frame.gather(1, step), torch.arange(T).expand(len(delays), T))
        assert (pattern.frame >= 0).sum() == T * len(delays)                   # each code stands once
        apart = torch.tensor([a != b for a, b in itertools.pairwise(flattening or delays)], dtype=torch.bool)
        assert (step.diff(dim=0)[apart] > 0).all()                        # strictly, unless they share a step


@pytest.mark.parametrize("name, flattening, S, S_valid, supervised", [
    ("delay", None, 1504, 1501, 5994), ("parallel", None, 1501, 1501, 6000),
    ("unrolled", None, 6001, 6001, 6000), ("unrolled", [0, 1, 1, 1], 3001, 3001, 6000)])
def test_lengths_of_a_30_second_clip(name, flattening, S, S_valid, supervised):
    pattern = patterns.make_pattern(name, 1500, 4, flattening=flattening)
    assert (pattern.S, pattern.S_valid, int(pattern.supervised.sum())) == (S, S_valid, supervised)


def test_valid_counts():
    assert patterns.make_pattern("delay", 20, 4).supervised.sum(1).tolist() == [20, 19, 18, 17]
    assert patterns.delay(20, STEREO).supervised.sum(1).tolist() == [20, 20, 19, 19, 18, 18, 17, 17]
    assert patterns.make_pattern("parallel", 20, 4).supervised.all()
    assert patterns.make_pattern("unrolled", 20, 4).supervised.all()
    # a clip shorter than the delays
    assert patterns.delay(2, [0, 1, 2, 3]).supervised.sum(1).tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("name, drawing", [
    ("delay", ["S0123|SSS", "SS012|3SS", "SSS01|23S", "SSSS0|123"]), ("parallel", ["S0123|"] * 4),
    ("unrolled", ["S0SSS1SSS2SSS3SSS|", "SS0SSS1SSS2SSS3SS|", "SSS0SSS1SSS2SSS3S|", "SSSS0SSS1SSS2SSS3|"])])
def test_worked_example(name, drawing):
    lines = patterns.draw_pattern(patterns.make_pattern(name, 4, 4)).splitlines()
    assert [line.replace(" ", "")[2:] for line in lines] == drawing
    assert all(line.strip().split(maxsplit=1)[1] in patterns.__doc__ for line in lines)  # the file's head too


def test_unrolled_with_delays_by_hand():
    """K=2, T=2, the second codebook a frame late: at equal times the older frame's code goes first."""
    pattern = patterns.unrolled(2, [0, 1], [0, 1])
    assert pattern.frame.tolist() == [[-1, 0, -1, 1, -1, -1], [-1, -1, 0, -1, 1, -1]]
    assert pattern.S_valid == 5


@pytest.mark.parametrize("name, delays, flattening", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_shifted_targets_are_realigned_logits(name, delays, flattening, padded):
    """Cross-entropy of a codebook, and its gradient: targets in the sequence, or logits on the frames."""
    for T in LENGTHS:
        pattern, _ = made(name, T, delays, flattening)
        B, K, S = 2, len(delays), pattern.S_valid
        codes = torch.randint(CARD, (B, K, T))
        frame_mask = torch.arange(T) < torch.tensor([[T], [(T + 1) // 2]]) if padded else None
        logits = torch.randn(B, K, S, CARD, dtype=torch.float64, requires_grad=True)
        targets = pattern.targets(codes, frame_mask)
        aligned, mask = pattern.revert_logits(logits)
        shorter, same_mask = pattern.revert_logits(logits[:, :, :-1])
        assert torch.equal(aligned.nan_to_num(1e9), shorter.nan_to_num(1e9)) and torch.equal(mask, same_mask)
        assert torch.equal(mask, pattern.supervised)
        assert torch.equal(aligned.isnan().all(-1), ~mask.expand(B, K, T))
        assert not aligned[:, mask].isnan().any()
        assert targets.shape == (B, K, S - 1)

        seq_losses, frame_losses = [], []
        for k in range(K):
            real = mask[k] & (frame_mask if padded else torch.ones(B, T, dtype=torch.bool))  # [B, T]
            assert int((targets[:, k] != -100).sum()) == int(real.sum())
            in_seq = logits[:, k, :-1].flatten(0, 1)                                         # [B*(S-1), card]
            seq_losses.append(F.cross_entropy(in_seq, targets[:, k].flatten(), reduction="sum"))
            frame_losses.append(F.cross_entropy(aligned[:, k][real], codes[:, k][real], reduction="sum"))
        torch.testing.assert_close(torch.stack(seq_losses), torch.stack(frame_losses), rtol=1e-12, atol=1e-12)
        losses = (seq_losses, frame_losses)
        grads = [torch.autograd.grad(sum(x), logits, retain_graph=True)[0] for x in losses]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
        assert (grads[0][:, :, -1] == 0).all()                             # the last step predicts nothing


def test_targets_are_the_next_step():
    pattern = patterns.make_pattern("delay", 6, 3)
    codes = torch.randint(CARD, (2, 3, 6))
    seq = pattern.build(codes, SPECIAL)
    assert torch.equal(pattern.targets(codes, ignore=SPECIAL), seq[:, :, 1:])
    frame_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    got = pattern.targets(codes, frame_mask)
    assert (got[1] >= 0).sum(1).tolist() == [4, 4, 4] and (got[0] >= 0).sum(1).tolist() == [6, 5, 4]


def test_asking_again_is_free():
    assert patterns.make_pattern("delay", 50, 4) is patterns.make_pattern("delay", 50, 4)
    a, b = (patterns.make_pattern("delay", 50, 4, delays) for delays in ([0, 1, 2, 3], (0, 1, 2, 3)))
    assert a is b
    pattern = patterns.make_pattern("delay", 50, 4)
    assert pattern.to("cpu") is pattern
    codes = torch.empty(2, 4, 50, dtype=torch.long, device="meta")  # a second device everywhere
    copies = patterns._moved.cache_info().misses
    for _ in range(3):
        assert pattern.build(codes, SPECIAL).device == codes.device
        pattern.revert_logits(torch.empty(2, 4, pattern.S_valid, CARD, device="meta"))
        pattern.targets(codes)
    assert patterns._moved.cache_info().misses == copies + 1
    assert pattern.to("meta") is pattern.to("meta")


def test_made_by_generation_used_in_training():
    """Cached tensors made under inference_mode would make backward fail."""
    with torch.inference_mode():
        pattern = patterns.make_pattern("delay", 51, 2)
    logits = torch.randn(1, 2, pattern.S_valid, CARD, requires_grad=True)
    pattern.revert_logits(logits)[0].nansum().backward()
    assert not pattern.frame.is_inference() and logits.grad.abs().sum() > 0


def test_long_clips_are_quick_to_lay_out():
    makers = (lambda: patterns.delay(1500, [0, 1, 2, 3]), lambda: patterns.parallel(1500, 4),
              lambda: patterns.unrolled(1500, [0, 1, 2, 3], [0, 1, 2, 3]))
    for maker in makers:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            maker()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.02, f"{min(seconds) * 1e3:.1f} ms"  # about 1 ms on an idle core


@pytest.mark.parametrize("arguments, message", [
    (("vall-e", 4, 4), "'vall-e'.*delay, parallel, unrolled"),
    (("delay", 0, 4), r"T \(frames\) is 0: at least 1"),
    (("delay", 4, 0), r"K \(codebooks\) is 0: at least 1"),
    (("parallel", 4, -1), r"K \(codebooks\) is -1"),
    (("delay", 4, 3, [0, 2, 1]), r"delays \[0, 2, 1\]: .*never falling"),
    (("delay", 4, 2, [-1, 0]), r"delays \[-1, 0\]: values of 0 or more"),
    (("delay", 4, 4, [0, 1]), r"delays \[0, 1\]: 4 values"),
    (("delay", 4, 2, []), r"delays \[\]: 2 values"),
    (("unrolled", 4, 2, None, [0, 1, 2]), r"flattening \[0, 1, 2\]: 2 values"),
    (("unrolled", 4, 2, None, [1, 0]), r"flattening \[1, 0\]: .*never falling"),
    (("unrolled", 4, 3, [0, 1, 2], [0, 1, 1]), "inner step 1 has delays 1 and 2"),
    (("parallel", 4, 2, [0, 1]), "'parallel': leave them out or choose 'delay'"),
    (("delay", 4, 2, None, [0, 1]), "only 'unrolled' takes one")])
def test_bad_requests_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        patterns.make_pattern(*arguments)
    assert "\n" not in str(error.value)


def test_the_functions_check_too():
    for call in (lambda: patterns.delay(4, []), lambda: patterns.delay(4, [1, 0]),
                 lambda: patterns.parallel(0, 2), lambda: patterns.unrolled(4, []),
                 lambda: patterns.unrolled(4, [0, 1], [0]),
                 lambda: patterns.unrolled(4, [0, 0], [0, 1])):
        with pytest.raises(ValueError):
            call()


def test_wrong_shapes_are_caught():
    pattern, codes = patterns.make_pattern("delay", 6, 3), torch.zeros(1, 3, 6, dtype=torch.long)
    for call in (lambda: pattern.build(torch.zeros(1, 3, 5, dtype=torch.long), SPECIAL),
                 lambda: pattern.build(torch.zeros(1, 2, 6, dtype=torch.long), SPECIAL),
                 lambda: pattern.revert(torch.zeros(1, 3, 8, dtype=torch.long), -1),
                 lambda: pattern.revert_logits(torch.zeros(1, 3, pattern.S, CARD)),
                 lambda: pattern.targets(codes, torch.ones(1, 5, dtype=torch.bool)),
                 lambda: pattern.first_step(6), lambda: pattern.first_step(-1)):
        with pytest.raises(AssertionError):
            call()


def test_the_file_draws_itself(capsys):
    assert patterns.main(["--T", "12", "--K", "2"]) == 0
    shown = capsys.readouterr().out
    assert "delay: S=14 steps, 13 valid; 13 model calls" in shown and "q2    S  S  0" in shown
    assert patterns.main(["--T", "0"]) == 2
    assert capsys.readouterr().err == (
        "patterns.py: T (frames) is 0: at least 1, at most 2^20, and 2^24 codes are allowed\n")


def test_nobody_reads_the_drawing():
    """As with `| head -1`: one line, no traceback."""
    script = [sys.executable, patterns.__file__]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        assert child.stderr.read() == "patterns.py: [Errno 32] Broken pipe\n"
    assert child.returncode == 2
