#!/usr/bin/env bash
# Install fcmae, with the versions of constraints.txt, into a new virtual environment: docker/install_fcmae.sh DIR
# PYTHON names the Python that makes it (default: python3).
set -euo pipefail
venv="$(realpath -m "$1")"
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$venv"
exec "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt '.[dicom,parquet,remote,report,tiff]'
