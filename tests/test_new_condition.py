"""A condition more is one class and one line: the tempo as a number, which trains, resumes and generates.

Nothing but the class below and its registration knows it, and neither train.py, generate.py nor the
evaluation names it.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import conditioning
import generate
import toy
import train
from support import audio
from support.condition import Condition, zero_padded
from support.flag import Flag
from test_train import lines, part, saved


# The condition: one class of 45 lines, in a file of its own.


@dataclass
class TempoConfig:
    """Shape of the tempo's conditioner."""
    low: float = 60.0                          # beats a minute that become 0
    high: float = 300.0                        # and 1


class Tempo(Condition):
    """Beats a minute to one token: a point on a line between two learned vectors."""
    name, plural, label, widget, metavar = "tempo", "tempi", "Tempo", "number", "BPM"
    Config, rng_stream = TempoConfig, 16
    flags = (
        Flag("tempo_low", "beats a minute at one end of the line",
             float, 60.0, range="positive", before=60.0),
    )

    def __init__(self, config: TempoConfig, dim: int, asset=None):
        super().__init__(config, dim)
        self.output_proj = nn.Linear(2, dim, bias=False)

    @classmethod
    def make_config(cls, args, codec, size, asset, stored):
        """The line's ends from the flags."""
        return TempoConfig(low=args.tempo_low)

    def from_example(self, example, codes, args, codec, rng):
        """The tempo of a toy clip."""
        return 60 / (0.02 * toy.BEAT_FRAMES[example.meta["toy"]["tempo"]]), None

    def from_user(self, given, codec):
        """A number, or a string that is one."""
        try:
            return float(given)
        except ValueError:
            raise ValueError("not a number of beats a minute") from None

    def from_toy(self, clip, text, wav):
        """The clip's tempo."""
        return 60 / (0.02 * toy.BEAT_FRAMES[clip.tempo])

    def prepare(self, values):
        """Numbers or None -> (places on the line [B, 1, 2], mask [B, 1])."""
        mask = torch.tensor([[v is not None] for v in values])
        tempo = torch.tensor([[v or 0.0] for v in values])
        place = (tempo - self.config.low) / (self.config.high - self.config.low)                # [B, 1]
        return torch.stack([place, 1 - place], -1), mask

    def forward(self, place, mask):
        """One token each."""
        return zero_padded(self.output_proj(place), mask)


# Its registration is one line.


@pytest.fixture(scope="module", autouse=True)
def registered():
    conditioning.CONDITIONS["tempo"] = Tempo
    yield
    del conditioning.CONDITIONS["tempo"]


SMALL = ("--size debug --batch_size 4 --updates_per_epoch 1 --valid_samples 4 --eval_samples 2 "
         "--generate_samples 1 --lr 0.01 --warmup_steps 0 --log_every 1 --device cpu --segment_seconds 1 "
         "--conditions text tempo --tempo_dropout 0.1 --tempo_low 50").split()


@pytest.fixture(scope="module")
def finished(registered, tmp_path_factory):
    """Two updates, the second after a resume; the gradient of the first weight of each update."""
    out, gradients = tmp_path_factory.mktemp("runs") / "tempo", []
    count_skipped = train.count_skipped

    def spy(run, norm, sums):
        gradients.append(run.model.conditioner.parts["tempo"].output_proj.weight.grad.clone())
        return count_skipped(run, norm, sums)

    train.count_skipped = spy
    try:
        for epochs in ("1", "2"):
            assert train.main([*SMALL, "--epochs", epochs, "--out", str(out)]) == 0
    finally:
        train.count_skipped = count_skipped
    return out, gradients


def test_it_trains_and_resumes(finished):
    """Its gradient is not zero, its weights move, and the evaluation says what it is worth."""
    out, gradients = finished
    assert len(gradients) == 2 and all(g.abs().sum() > 0 for g in gradients)
    state = saved(out)
    assert state["step"] == 2 and "conditioner.parts.tempo.output_proj.weight" in part(state, "model")
    assert state["conditioner_config"]["fuse"] == {"tempo": "prepend", "text": "cross+sum"}
    assert state["conditioner_config"]["tempo_low"] == 50 and state["args"]["tempo_dropout"] == 0.1
    evaluated = [r for r in lines(out) if r["kind"] == "stage" and r["stage"] == "evaluate"][-1]
    assert {"ce_no_tempo", "ce_shuffled_tempo", "ce_no_text"} <= evaluated.keys()
    assert "tempo" in evaluated["given"]


def test_it_generates_by_its_flag(finished, tmp_path, capsys):
    """Nobody wrote --tempo: two tempi, one seed, other audio; the record names it."""
    flags = ["--run", str(finished[0]), "--prompt", "fast bells", "--cfg", "3", "--seconds", "1"]
    assert generate.main([*flags, "--tempo", "60", "250", "--out", str(tmp_path)]) == 0
    assert generate.main([*flags, "--out", str(tmp_path)]) == 0
    wavs = [audio.read_audio(tmp_path / f"00{i}.wav") for i in range(3)]
    records = [json.loads((tmp_path / f"00{i}.json").read_text()) for i in range(3)]
    assert [r["tempo"] for r in records] == ["60", "250", None]
    music = generate.MusicGenerator.load(finished[0])
    greedy = generate.Sampling(cfg=2, temperature=0)
    same = music.generate([None, None], 1, sampling=greedy, tempo=[94, 94.0])
    other = music.generate([None, None], 1, sampling=greedy, tempo=[94, 250])
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], other[0])
    assert not torch.equal(other[0], other[1])
    assert not torch.equal(wavs[0], wavs[2])
    assert generate.main([*flags, "--tempo", "quick", "--out", str(tmp_path)]) == 2
    assert "--tempo quick: not a number" in capsys.readouterr().err


def test_a_run_without_it_says_so(finished, tmp_path, capsys):
    """Its flags are checked as all others are; a model that was not trained on it refuses it."""
    assert train.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / "a"), "--tempo_low", "-3"]) == 2
    assert "--tempo_low -3.0: more than 0" in capsys.readouterr().err
    assert train.main([*SMALL, "--epochs", "2", "--out", str(finished[0]), "--tempo_low", "70"]) == 2
    assert "--tempo_low 50.0 there, 70.0 now" in capsys.readouterr().err
