"""What scores. Before any library of it is loaded, what libraries would send to their makers is switched off."""

import os

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",  # https://donottrack.sh
}
"""What onnxruntime, and huggingface_hub and hf-xet with all that use them, read when they are loaded.

onnxruntime's `disable_telemetry_events` comes too late: by then it has written an id of this machine into its home.
"""
# Whatever the environment says: nobody is told of what is moderated here.
os.environ.update(SILENT)
