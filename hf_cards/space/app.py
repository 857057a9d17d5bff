from timm_finet.space import space

space()
