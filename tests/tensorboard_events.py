"""Reads a run's event files with TensorBoard, and prints what it has found as JSON: steps and values of each number, and the number
of pictures and their steps.

    python tests/tensorboard_events.py RUN/tensorboard
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [[e.step, e.width, e.height] for e in events.Images(tag)] for tag in tags["images"]}
    texts = {
        tag: [value.decode() for event in events.Tensors(tag) for value in event.tensor_proto.string_val]
        for tag in tags["tensors"]
    }
    print(json.dumps({"scalars": scalars, "images": images, "texts": texts}))


if __name__ == "__main__":
    main()
