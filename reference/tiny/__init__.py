"""The bundled tiny DeepSeek-VL: how its pictures, questions and weights were made."""
