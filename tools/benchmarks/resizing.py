"""`python -m tools.benchmarks.resizing`: preprocessing's work on an image beside img2dataset's.

JPEGs of web-like sizes (random parts of scikit-learn's two sample photographs, shorter side 300 to
1,200 px, quality 75 to 95) become centre squares of 256 px, as JPEGs of quality 95. Ours does all
that `diti data preprocess` does to a sample: checks, decoding, resizing, encoding, both hashes.
img2dataset's resizer runs in a Python of its own, which has to be made first:

    python3.11 -m venv /tmp/i2d && /tmp/i2d/bin/pip install img2dataset
    python -m tools.benchmarks.resizing --img2dataset-python /tmp/i2d/bin/python

Each is a process with one thread; they take turns on the same images, several times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from tools.benchmarks.resizing_peers import RESIZERS, write_images

PEERS = Path(__file__).with_name("resizing_peers.py")
SHORTER_PX = (300, 1200)


def web_images(count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEGs whose shorter sides are spread evenly on a logarithmic scale."""
    random = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for _ in range(count):
        source = sources[random.integers(len(sources))]
        shorter = round(np.exp(random.uniform(*np.log(SHORTER_PX))))
        size = (round(shorter * random.uniform(1, 1.8)), shorter)
        box_height = int(random.integers(200, min(source.size)))
        box_width = min(source.size[0], round(box_height * size[0] / size[1]))
        left = int(random.integers(0, source.size[0] - box_width + 1))
        top = int(random.integers(0, source.size[1] - box_height + 1))
        part = source.resize(size, box=(left, top, left + box_width, top + box_height))
        yield simplejpeg.encode_jpeg(
            np.ascontiguousarray(part),
            quality=int(random.integers(75, 96)),
            colorspace="RGB",
            colorsubsampling="420",
        )


def cpu_seconds(python: str, name: str, file: Path) -> tuple[float, int]:
    """Of one pass over the images, and the bytes that came out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == "ours":
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    told = subprocess.run(  # noqa: S603
        [python, PEERS, name, file], capture_output=True, text=True, check=True, env=environment
    )
    seconds, size = told.stdout.split()
    return float(seconds), int(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--img2dataset-python", required=True, help="a Python that has img2dataset")
    args = parser.parse_args()
    pythons = {"ours": sys.executable, "img2dataset": args.img2dataset_python}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images")
        images = list(web_images(args.images))
        write_images(file, images)
        print(f"{len(images)} JPEGs of {sum(map(len, images)) / len(images) / 1024:.0f} KiB each")
        for number in range(1, args.rounds + 1):
            rate = {}
            for name in RESIZERS:
                seconds, size = cpu_seconds(pythons[name], name, file)
                rate[name] = args.images / seconds
                print(
                    f"round {number}, {name}: {rate[name]:.0f} images per CPU second, "
                    f"{size / args.images / 1024:.1f} KiB each",
                    flush=True,
                )
            ratios.append(rate["ours"] / rate["img2dataset"])
    print(f"ours over img2dataset: {', '.join(f'{r:.2f}' for r in ratios)}; median "
          f"{statistics.median(ratios):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
