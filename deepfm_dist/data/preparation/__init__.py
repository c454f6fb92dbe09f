"""Input files -> prepared dataset; `local` runs the steps on the threads of one process."""
