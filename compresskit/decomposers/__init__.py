"""Ways to factorise a weight matrix: one file each, registered under the name that ``--method`` takes."""
