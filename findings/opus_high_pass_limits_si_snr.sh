#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2, libopus): at 256 kbit/s a tone of 30 Hz comes back at an SI-SNR of 20 dB only.
#
# Seen (soundfile==0.14.0, CPython 3.11): pure tones of 30, 50 and 100 Hz at 48 kHz through Ogg Opus at its highest bit rate
# have an SI-SNR of 20.0, 24.6 and 30.7 dB; more bits change nothing. It is the phase that a first-order high pass at 3 Hz
# turns: -20 log10(sin(atan(3 / f))) gives 20.0, 24.5, 30.5. It cannot be heard. So SI-SNR, the usual figure of neural
# codecs, makes Opus look worse the more bass the music has; compare mel distances, or take the bass out of both first.
#
# Run: bash findings/opus_high_pass_limits_si_snr.sh      (installs soundfile into a temporary folder; fails if this changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "soundfile==0.14.0" "numpy<3"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import soundfile

RATE = 48_000
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
time = np.arange(4 * RATE) / RATE
for hertz in (30, 50, 100):
    tone = 0.3 * np.sin(2 * np.pi * hertz * time)
    file = io.BytesIO()
    soundfile.write(file, tone, RATE, format="OGG", subtype="OPUS", compression_level=0.0)
    file.seek(0)
    back = soundfile.read(file)[0]
    inside = slice(RATE, 3 * RATE)             # away from both ends
    wanted, found = tone[inside], back[inside]
    gain = (found * wanted).sum() / (wanted * wanted).sum()
    si_snr = 10 * np.log10(((gain * wanted) ** 2).sum() / ((found - gain * wanted) ** 2).sum())
    predicted = -20 * np.log10(np.sin(np.arctan(3 / hertz)))
    print(f"{hertz} Hz: SI-SNR {si_snr:.1f} dB, by a high pass at 3 Hz {predicted:.1f} dB")
    assert abs(si_snr - predicted) < 1, "Opus does something else to bass: this finding is out of date"
PYTHON
