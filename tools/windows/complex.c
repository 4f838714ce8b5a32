/* The complex functions of C99, which Windows' C library has and Wine's ends the process at.

   Windows keeps complex numbers in structures, its long double is a double. Every function FN is defined here as
   ovtq_FN; `install` makes a DLL that exports these by their right names and forwards all others to Wine's. */
#include <complex.h>

typedef struct { double re, im; } Double;
typedef struct { float re, im; } Float;

static double complex of_double(Double x) {
  double complex z;
  __real__ z = x.re;
  __imag__ z = x.im;
  return z;
}

static double complex of_float(Float x) { return of_double((Double){x.re, x.im}); }
static Double to_double(double complex z) { return (Double){creal(z), cimag(z)}; }
static Float to_float(double complex z) { return (Float){(float)creal(z), (float)cimag(z)}; }

#define COMPLEX(fn) \
  Double ovtq_##fn(Double x) { return to_double(fn(of_double(x))); } \
  Double ovtq_##fn##l(Double x) { return to_double(fn(of_double(x))); } \
  Float ovtq_##fn##f(Float x) { return to_float(fn(of_float(x))); }
#define REAL(fn, value) \
  double ovtq_##fn(Double x) { double complex z = of_double(x); return value; } \
  double ovtq_##fn##l(Double x) { double complex z = of_double(x); return value; } \
  float ovtq_##fn##f(Float x) { double complex z = of_float(x); return (float)(value); }

COMPLEX(cexp) COMPLEX(clog) COMPLEX(csqrt) COMPLEX(conj) COMPLEX(cproj)
COMPLEX(csin) COMPLEX(ccos) COMPLEX(ctan) COMPLEX(csinh) COMPLEX(ccosh) COMPLEX(ctanh)
COMPLEX(casin) COMPLEX(cacos) COMPLEX(catan) COMPLEX(casinh) COMPLEX(cacosh) COMPLEX(catanh)
REAL(creal, creal(z)) REAL(cimag, cimag(z)) REAL(cabs, cabs(z)) REAL(carg, carg(z))
REAL(norm, creal(z) * creal(z) + cimag(z) * cimag(z))

Double ovtq_cpow(Double x, Double y) { return to_double(cpow(of_double(x), of_double(y))); }
Double ovtq_cpowl(Double x, Double y) { return to_double(cpow(of_double(x), of_double(y))); }
Float ovtq_cpowf(Float x, Float y) { return to_float(cpow(of_float(x), of_float(y))); }
Double ovtq__Cbuild(double re, double im) { return (Double){re, im}; }
Double ovtq__LCbuild(double re, double im) { return (Double){re, im}; }
Float ovtq__FCbuild(float re, float im) { return (Float){re, im}; }
