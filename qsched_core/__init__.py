"""Q-Sched's mathematics in plain torch: nothing here imports ComfyUI."""
