#!/usr/bin/env bash
# torch 2.11.0, torch.distributed.checkpoint: two saves of the same tensors write a different .metadata file.
#
# Seen (torch==2.11.0, CPython 3.11, one process): the files with the tensors (__0_0.distcp) are equal byte for byte from
# save to save, .metadata is not. It holds StorageMeta.save_id, a random identifier made at each save. So a checksum of a
# checkpoint folder never repeats, though nothing in it changed: compare tensors, or leave .metadata out.
# torch.save of the same tensors does repeat byte for byte.
#
# Run: bash findings/checkpoint_metadata_never_repeats.sh     (installs torch into a temporary folder; fails if this changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.11.0" "numpy<3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import io
import pathlib
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")                # that one process is one process
tensors = {"a": torch.arange(6.0), "b": torch.ones(3, 3)}
seen, plain = [], []
for name in ("first", "second", "third"):
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(name), no_dist=True)
    seen.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path(name).iterdir()})
    file = io.BytesIO()
    torch.save(tensors, file)
    plain.append(file.getvalue())

print("torch", torch.__version__)
for name in sorted(seen[0]):
    print(f"{name}: {len({digests[name] for digests in seen})} different files in three saves")
print(f"torch.save: {len(set(plain))} different files in three saves")
assert sorted(seen[0]) == [".metadata", "__0_0.distcp"], "other files than in torch 2.11.0"
assert len({digests[".metadata"] for digests in seen}) == 3, ".metadata repeats: this finding is out of date"
assert len({digests["__0_0.distcp"] for digests in seen}) == 1 and len(set(plain)) == 1
PYTHON
