"""The methods of stain normalisation; to add one: a file with its record, and its place in `METHODS`."""

from wsiflow.slides.stain import macenko, reinhard, vahadane
from wsiflow.slides.stain.method import StainMethod

#: The methods by name, each described in its own file.
METHODS: dict[str, StainMethod] = {method.name: method for method in (reinhard.METHOD, macenko.METHOD, vahadane.METHOD)}
