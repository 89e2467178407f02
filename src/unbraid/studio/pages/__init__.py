"""The pages of the studio, one per file, and `app`, which puts them into one window and serves it. The only place with gradio."""
