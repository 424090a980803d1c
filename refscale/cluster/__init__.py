"""All that talks to Ray: graphs of steps, training, jobs, metrics."""
