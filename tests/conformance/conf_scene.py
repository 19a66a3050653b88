# SPDX-License-Identifier: Apache-2.0
"""What cases with mock devices begin with."""

from conf_env import NEST, PAGE, outcome
from conf_rows import ABSENT, BASE
from conf_selftest import MOCK_FLAGS_DEVICE_NO_DIRTY


class Scene:
    """A mock device on an IOAS, a nesting parent, and an HWPT that is none ("plain").

    ``names``: the objects by what rows call them. ``flags``: MOCK_FLAGS_DEVICE_*.
    """

    def __init__(self, env, flags=MOCK_FLAGS_DEVICE_NO_DIRTY):
        self.env = env
        self.fd = env.iommu()
        self.ioas = env.ioas(self.fd)
        self.fill()
        self.stdev, self.auto, self.dev = env.mock(self.fd, self.ioas, flags)
        self.parent = env.hwpt(self.fd, self.dev, self.ioas, NEST)
        self.plain = env.hwpt(self.fd, self.dev, self.ioas)
        self.names = {
            "ioas": self.ioas, "auto": self.auto, "dev": self.dev, "parent": self.parent,
            "plain": self.plain, "absent": ABSENT, "stdev": self.stdev,
        }  # fmt: skip

    def fill(self):
        """What is mapped before the device comes: a page at BASE."""
        self.env.map_file(self.fd, self.ioas, self.env.memfd(PAGE), 0, PAGE, BASE)

    def given(self, fields):
        """Fields with names for what they stand for."""
        return {key: self.names.get(value, value) for key, value in fields.items()}

    def replace(self, pt):
        """None, or the errno's name."""
        answer = outcome(self.env.mock_replace, self.fd, self.stdev, pt)
        return answer if isinstance(answer, str) else None

    def destroy(self, *numbers):
        """None or the errno's name; of more than one a list."""
        answers = [outcome(self.env.destroy, self.fd, number) for number in numbers]
        return answers if len(answers) > 1 else answers[0]
