"""The memorization check: its counts by hand; a model that knows its clips by heart, one that knows none."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bad_material
import tokenizer
import train
from data import Example
from evaluate import memorization
from evaluate.memorization import copied, nearest_shares, share_equal
from generate import Sampling
from model import ModelConfig, MusicGen

K, T = 3, 40


def test_shares_of_equal_codes():
    """Padding counts neither as equal nor as another code."""
    wanted = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    found = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 4, 5], [1, 9, 3, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    shares = share_equal(found, wanted, mask)
    assert torch.allclose(shares, torch.tensor([4 / 5, 1, 2 / 3]))
    assert copied(shares) == pytest.approx(dict(exact=1 / 3, near=2 / 3, equal=(0.8 + 1 + 2 / 3) / 3))


def test_the_nearest_passage_lies_anywhere_but_in_padding():
    clips = torch.tensor([[7, 1, 2, 3, 4, 0], [9, 9, 1, 2, 5, 6]])
    mask = torch.ones(2, 6).bool()
    passages = torch.tensor([[1, 2, 3], [2, 5, 8], [8, 5, 6]])
    assert torch.allclose(nearest_shares(passages, clips, mask), torch.tensor([1, 2 / 3, 2 / 3]))
    mask[1, 4:] = False
    assert torch.allclose(nearest_shares(passages, clips, mask), torch.tensor([1, 1 / 3, 0]))


class Songs:
    """Random codes; the third clip ends early."""
    def example(self, epoch: int, index: int) -> Example:
        codes = torch.randint(13, (K, T), generator=torch.Generator().manual_seed(1000 * epoch + index))
        return Example(segment_frames=T, meta={}, path=f"{index}", index=index, start_seconds=0.0, wav=None,
                       codes=codes.numpy(), frames=25 if index == 2 else T)


def table(model: MusicGen) -> dict:
    """{beginning of a line: its numbers} of a model on four clips of epoch 0 and four of another."""
    music = SimpleNamespace(model=model, codec=SimpleNamespace(frame_rate=10.0), window=T,
                            sampling=Sampling(cfg=1, top_k=5), dtype=torch.float32)
    sets = {"training": (Songs(), 0), "held out": (Songs(), 1)}
    lines = memorization.measure_memorization(music, sets, None, [1.0, 3.0, 9.0], 4, 4)
    assert lines[4] == "prompt 9 s: left out, the segments last 4 s"
    found = {}
    for line in lines[:4]:
        words = line.split()
        found[f"{words[1]} {words[3]}"] = [float(words[words.index(key) + 1])
                                           for key in ("exact", "near", "equal")]
        assert int(words[words.index("clips") - 1]) == (4 if words[1] == "1" else 3), "one clip is too short"
    for line in lines[5:]:
        found[line.split(", ")[1].split()[0]] = float(line.split("nearest ")[1].split(",")[0])
    return found


def test_a_model_that_knows_its_clips_by_heart():
    torch.manual_seed(0)
    model = MusicGen(ModelConfig(K=K, card=13, dim=32, num_layers=2, num_heads=2, emb_std=1.0))
    untrained = table(model.eval())
    assert untrained["1 training"][0] == untrained["3 training"][0] == 0
    assert untrained["1 training"][2] < 0.3 and untrained["generated"] < 0.6

    codes = torch.stack([torch.from_numpy(Songs().example(0, i).codes) for i in range(4)])
    mask = torch.ones(4, T).bool()
    mask[2, 25:] = False
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2)
    for _ in range(150):
        loss = (model(codes, mask) / model.count_targets(mask)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = table(model.eval())
    assert learnt["1 training"] == learnt["3 training"] == [1, 1, 1]
    assert learnt["1 held"][0] == learnt["3 held"][0] == 0 and learnt["1 held"][2] < 0.4
    assert learnt["generated"] > 0.75 and learnt["held"] < 0.6


def test_the_command(capsys, monkeypatch):
    """On a run of an older version, and what it refuses."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    run = "tests/old_run"
    memorization.main(["--run", run, "--n", "3", "--searched", "5", "--prompt_seconds", "0.2", "0.4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" clips")[0].split(", ")[1].split()[0] for line in lines[-6:]] == [
        "training", "held", "training", "held", "generated", "held"]
    monkeypatch.setattr(memorization, "draw_passages", lambda music, clips, L, seed: torch.zeros(3, L).long())
    memorization.main(["--run", run, "--n", "3", "--searched", "5", "--prompt_seconds", "0.2"])
    assert "(different codes in it: 1), of 5 clips" in capsys.readouterr().out.splitlines()[-2]
    for argv, says in ((["--n", "0"], "--n 0"), (["--prompt_seconds", "-1"], "--prompt_seconds -1"),
                       (["--valid", "0.1"], "--valid 0.1: tests/old_run was trained on the token cache"),
                       (["--cache", "no/such"], "no/such"),
                       (["--codec", "nowhere.pt"], "nowhere.pt")):
        assert memorization.main(["--run", run, *argv]) == 2
        assert says in capsys.readouterr().err


def test_data_and_codec_that_have_moved(tmp_path, capsys, monkeypatch):
    """They are taken from where they lie now; other data are refused, and where they lay they are named."""
    monkeypatch.chdir(tmp_path)
    bad_material.music(tmp_path / "music", "good.wav")
    shutil.copy(tokenizer.TOY_FILE, "codec.pt")
    flags = [*bad_material.TINY_TRAINING, "--dataset", "music", "--valid", "0.4", "--codec", "codec.pt"]
    assert train.main([*flags, "--out", "run"]) == 0

    def check(*more: str) -> tuple:
        capsys.readouterr()
        few = ["--n", "1", "--searched", "1", "--prompt_seconds", "0.2"]
        code = memorization.main(["--run", "run", *few, *more])
        return code, *capsys.readouterr()

    code, usual, _ = check()
    assert not code and "passages of" in usual and "the data are not" not in usual
    shutil.move("music", "elsewhere")
    shutil.move("codec.pt", "other.pt")
    assert check()[0] == 2
    moved = ("--dataset", "elsewhere", "--codec", "other.pt")
    code, found, _ = check(*moved)
    assert not code and found.splitlines()[-4:] == usual.splitlines()[-4:]
    code, _, error = check(*moved, "--valid", "0.7")
    assert code == 2 and "the data are not those of run" in error and error.count("\n") == 1
    shutil.copy("elsewhere/song0.wav", "elsewhere/song9.wav")
    assert check(*moved)[0] == 2
    shutil.move("elsewhere", "music")
    code, found, _ = check("--codec", "other.pt")                    # as in train.py: a line
    assert not code and "the data are not those of run" in found
    Path("run/last.pt").unlink()
    code, found, _ = check("--codec", "other.pt", "--dataset", "music")
    assert not code and "last.pt does not say which files" in found
