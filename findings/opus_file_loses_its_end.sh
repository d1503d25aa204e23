#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2): the last 6.5 ms of an Ogg Opus file that it writes at 24 or 48 kHz are not the input.
#
# Seen (soundfile==0.14.0, CPython 3.11): a tone comes back with all its samples, and after the start within 1 % of full
# scale of the input, but the last 6.5 ms (the encoder's look-ahead) are off by as much as the tone: half of them are
# silent. At 16 kHz they are right. The encoder is not fed the silence that would push its last samples out. Who cuts
# clips to Opus files and joins them again gets a click at every seam; silence after the end, cut off later, mends it.
#
# Run: bash findings/opus_file_loses_its_end.sh           (installs soundfile into a temporary folder; fails if this changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "soundfile==0.14.0" "numpy<3"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import soundfile

print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
for rate, whole in ((16_000, True), (24_000, False), (48_000, False)):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    file = io.BytesIO()
    soundfile.write(file, tone, rate, format="OGG", subtype="OPUS", compression_level=0.0)
    file.seek(0)
    back = soundfile.read(file)[0]
    assert len(back) == len(tone)
    error, last = np.abs(back - tone), round(0.0065 * rate)
    print(f"{rate} Hz: off by {error[rate:-rate // 20].max():.4f} before the end, {error[-last:].max():.3f} at the end")
    assert error[rate:-rate // 20].max() < 0.01
    assert (error[-last:].max() < 0.01) == whole, "the end is another: this finding is out of date"
PYTHON
