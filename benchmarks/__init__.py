"""What is measured beyond `lora-mixer bench`: peers side by side, scaling, serving, and the tables made of them."""
