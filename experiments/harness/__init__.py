"""What every experiment runs in: the catalogue, trials in processes, results on disk, the page that is written of them.

May import `common`. Every other folder of `experiments` may import it.
"""
