package bench

import (
	"math"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
)

// The distributions of keys, as YCSB names them.
const (
	uniform    = "uniform"    // each key as often as any other
	zipf       = "zipf"       // few keys often, most seldom: the i-th in proportion to 1/i^0.99
	sequential = "sequential" // one after the other, all clients together
	latest     = "latest"     // writes are sequential; reads are zipf from the newest backwards
)

// zipfSkew is YCSB's constant.
const zipfSkew = 0.99

// keyspace is the keys of a run: the prefix and a number, as wide as the key size wants.
type keyspace struct {
	prefix  string // raw
	escaped string // as a path has it
	digits  int
	n       int64
	kind    string
	zipf    zipfian
	step    int64        // coprime to n: scatters the ranks of a zipf draw over the keys
	cursor  atomic.Int64 // how many sequential keys were drawn
}

func newKeyspace(o *Options) *keyspace {
	k := &keyspace{prefix: o.Prefix, escaped: escapePath(o.Prefix), digits: o.KeySize - len(o.Prefix), n: int64(o.Keys), kind: o.Distribution}
	if k.kind == zipf || k.kind == latest {
		k.zipf = newZipfian(k.n, zipfSkew)
	}
	for k.step = max(int64(float64(k.n)*0.618), 1); gcd(k.step, k.n) != 1; {
		k.step++
	}
	return k
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// digitsOf is the width of the largest number of n keys.
func digitsOf(n int) int { return len(strconv.Itoa(n - 1)) }

// escapePath keeps the slashes: a server takes a//b and .. as they stand.
func escapePath(raw string) string {
	return strings.ReplaceAll(url.PathEscape(raw), "%2F", "/")
}

// appendPath appends key i as a path has it.
func (k *keyspace) appendPath(dst []byte, i int64) []byte {
	dst = append(dst, k.escaped...)
	var digits [20]byte
	number := strconv.AppendInt(digits[:0], i, 10)
	for range k.digits - len(number) {
		dst = append(dst, '0')
	}
	return append(dst, number...)
}

// write draws the key of a write, read that of a read.
func (k *keyspace) write(rng *rand.Rand) int64 {
	if k.kind == latest {
		return (k.cursor.Add(1) - 1) % k.n
	}
	return k.read(rng)
}

func (k *keyspace) read(rng *rand.Rand) int64 {
	switch k.kind {
	case zipf:
		return k.zipf.draw(rng.Float64()) * k.step % k.n
	case sequential:
		return (k.cursor.Add(1) - 1) % k.n
	case latest:
		newest := k.cursor.Load() - 1 + k.n // the fill has written all of them
		return (newest - k.zipf.draw(rng.Float64())) % k.n
	}
	return rng.Int64N(k.n)
}

// zipfian draws ranks from 0 in proportion to 1/(rank+1)^theta, with 0 < theta <
// 1, in constant time: Gray et al., "Quickly Generating Billion-Record Synthetic
// Databases", SIGMOD 1994, section 3. math/rand has only skews above 1.
type zipfian struct {
	n                       int64
	zeta, theta, alpha, eta float64
}

func newZipfian(n int64, theta float64) zipfian {
	z := zipfian{n: n, theta: theta, alpha: 1 / (1 - theta), zeta: zeta(n, theta)}
	z.eta = (1 - math.Pow(2/float64(n), 1-theta)) / (1 - zeta(2, theta)/z.zeta)
	return z
}

// zeta is the sum of 1/i^theta for i from 1 to n: added up for the first million,
// by the integral (with half of each end) beyond.
func zeta(n int64, theta float64) (sum float64) {
	const exact = 1_000_000
	m := min(n, exact)
	for i := m; i > 0; i-- {
		sum += math.Pow(float64(i), -theta)
	}
	if n > m {
		a, b := float64(m), float64(n)
		sum += (math.Pow(b, 1-theta)-math.Pow(a, 1-theta))/(1-theta) + (math.Pow(b, -theta)-math.Pow(a, -theta))/2
	}
	return sum
}

// draw turns u, uniform from 0 to below 1, into a rank below n.
func (z *zipfian) draw(u float64) int64 {
	switch share := u * z.zeta; {
	case z.n == 1 || share < 1:
		return 0
	case z.n == 2 || share < 1+math.Pow(0.5, z.theta):
		return 1
	}
	return min(int64(float64(z.n)*math.Pow(z.eta*u-z.eta+1, z.alpha)), z.n-1)
}

// values is a pool of random bytes; a value is a piece of it from anywhere, so
// that neither making it nor compressing it costs or saves anything.
type values struct {
	pool []byte
	size int
}

const valueOffsets = 64 << 10 // places where a value may begin

// newValues makes values of random bytes, or of random letters and digits:
// those look the same in JSON.
func newValues(size int, text bool, seed uint64) values {
	v := values{pool: make([]byte, valueOffsets+size), size: size}
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	_, _ = rand.NewChaCha8(key).Read(v.pool) // it never fails
	if text {
		const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		for i, b := range v.pool {
			v.pool[i] = letters[b%64]
		}
	}
	return v
}

func (v *values) draw(rng *rand.Rand) []byte {
	at := rng.IntN(valueOffsets)
	return v.pool[at : at+v.size]
}
