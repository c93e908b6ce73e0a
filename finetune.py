"""Fine-tune a pretrained encoder for classification, from a clone and on any number of processes.

    python finetune.py --config finetune_atto --data.path labelled --model.init runs/first --out runs/tuned
    accelerate launch finetune.py --config finetune_atto --data.path labelled --model.init runs/first --out runs/tuned

The same as `fcmae finetune`; `--help` lists the settings.
"""

import sys

from fcmae.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
