"""Input files -> a prepared dataset; `local` drives the steps on the threads of one process."""
