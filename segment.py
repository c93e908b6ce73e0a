"""Train a network that gives every pixel a class, from a clone and on any number of processes.

    python segment.py --config segment_cpu --data.path images --maps maps --model.init runs/first --out runs/segmented
    accelerate launch segment.py --config segment_tiny --data.path images --maps maps --out runs/segmented

The same as `fcmae segment`; `--help` lists the settings.
"""

import sys

from fcmae.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
