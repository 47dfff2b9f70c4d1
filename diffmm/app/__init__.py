"""A local page to try a trained model (`diffmm app RUN`), made with Gradio, an extra."""
