#!/usr/bin/env bash
# The wheel mooncake-transfer-engine-non-cuda 0.3.13.post1 is tagged manylinux, so pip installs it on
# every Linux with glibc; but its client and its master link libcurl, libibverbs and libnuma, which
# are neither in the wheel nor among the libraries that PEP 600's policies count on. On a minimal
# Debian 12 importing mooncake.store is an ImportError, and mooncake_master doesn't start, until
# `apt-get install libcurl4 libibverbs1 libnuma1`.
#
# Seen on 2026-11-30. Ends with 1 if another version of the wheel is fetched or if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyelftools==0.32
"$folder/venv/bin/pip" download --quiet --no-deps --only-binary :all: --dest "$folder" \
  mooncake-transfer-engine-non-cuda==0.3.13.post1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import io
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

POLICY = {  # of what the wheel links, what PEP 600's policies allow
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libresolv.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2"),
}
(path,) = Path(sys.argv[1]).glob("*.whl")
needed = {}
with zipfile.ZipFile(path) as wheel:
    inside = {Path(name).name for name in wheel.namelist()}
    for name in wheel.namelist():
        data = wheel.read(name)
        if data[:4] != b"\x7fELF":
            continue
        dynamic = ELFFile(io.BytesIO(data)).get_section_by_name(".dynamic")
        links = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} if dynamic else set()
        if lacking := links - inside - POLICY:
            needed[Path(name).name] = sorted(lacking)
print(path.name)
for name, libraries in sorted(needed.items()):
    print(f"  {name}: {', '.join(libraries)}")
libraries = ["libcurl.so.4", "libibverbs.so.1", "libnuma.so.1"]
assert "manylinux" in path.name, "the tag has changed"
assert needed.get("store.so") == needed.get("mooncake_master") == libraries, "what is linked changed"
print("as described")
PYTHON
