"""Productions of the Spanish half of the grammar. A bar separates productions; ``{...}`` are slots."""

# ruff: noqa: SIM905 - words in a row read better than a list literal
from __future__ import annotations

OPENER = """\
Hola|Hola {person}|Buenos días|Buenas tardes|Buenas noches|Buenas|Buen día|Qué tal|Qué tal {person}|Estimados|\
Estimado {person}|Estimada {person}|Oye|Oye {person}|Disculpa|Disculpe|Perdón|Con permiso|Saludos|Hola equipo|\
Hola a todos|Muy buenas|Cómo están|Hola de nuevo|Señores|Apreciado proveedor|Hola otra vez|Aquí {person}|\
Soy {person}|Le escribe {person}""".split("|")

REQUEST = """\
necesito|necesito comprar|necesitamos|necesitamos comprar|quiero|quiero pedir|quiero comprar|quiero encargar|\
queremos|queremos pedir|quisiera|quisiera pedir|quisiera comprar|quisiéramos encargar|me gustaría pedir|\
me gustaría comprar|nos gustaría encargar|deseo comprar|deseo adquirir|deseamos adquirir|mándame|mándenme|\
mándanos|envíame|envíenme|envíanos|favor de enviar|por favor envía|por favor manda|por favor apunta|apúntame|\
anota|anótame|ponme|póngame|pónganos|resérvame|resérvenos|voy a llevar|voy a querer|vamos a necesitar|\
vamos a pedir|me hacen falta|nos hacen falta|hacen falta|requiero|requerimos|solicito|solicitamos|te encargo|\
les encargo|agrégame|agrega al pedido|suma al pedido|pido|pedimos|compro|compramos|cotízame y mándame|\
podrías enviarme|podrían mandarnos|me puedes surtir|nos pueden surtir|puedes conseguirme|hay que pedir|\
tenemos que comprar|tengo que comprar|me urge comprar|nos urge recibir|ocupo|ocupamos|dame|denme|tráeme""".split("|")

ORDER = """\
{open}{request} {items}{due}{close}|{open}{request} {items}{due}{close}|{open}{request} {items}{due}{close}|\
{open}{request}: {items}{due}{close}|{open}{request} lo siguiente: {items}{due}{close}|\
{open}{request} esto: {items}{due}{close}|{open}{front}{request} {items}{close}|\
{open}{front}{request}: {items}{close}|{open}{note}{request} {items}{due}{close}|{open}{items}{due}{close}|\
{open}pedido: {items}{due}{close}|{open}este es mi pedido: {items}{due}{close}|\
{open}nuevo pedido, {items}{due}{close}|{open}va la lista: {items}{due}{close}|{open}{front}{items}{close}|\
{open}{request}, si se puede, {items}{due}{close}|{open}{request} cuanto antes {items}{due}{close}|\
{open}{request} también {items}{due}{close}""".split("|")

ITEM = """\
{qu_of} {p}{price}|{qu_of} {p}{price}|{qu_of} {p}{price}|{p}: {qu}{price}|{p}, {qu}{price}|{p} ({qu}{price})|\
{p} ({qu}){price}|{p} x {qu}{price}|{p} - {qu}{price}|{p} = {qu}{price}|{p}, cantidad {qu}{price}|\
{p}, en total {qu}{price}|{p} (cantidad: {qu}){price}|{p}{price}, {qu}|de {p}, {qu}{price}|\
del {p} van {qu}{price}|cantidad {qu}, producto {p}{price}|{lead}{qu_of} {p}|unas {qu_of} {p}{price}|\
otras {qu_of} {p}{price}""".split("|")

PRODUCT = """\
{name}|{name}|{name}|{name}|{name}|{name}|producto {name}|el producto {name}|artículo {name}|modelo {name}|\
el modelo {name}|referencia {name}|ref. {name}|código {name}|la pieza {name}|marca {name}|tipo {name}|"{name}"|\
'{name}'|«{name}»|*{name}*|[{name}]""".split("|")

PRICE = """\
 a {m}| a {m}| a {m} cada uno| a {m} cada una| a {m} c/u| a {m} la pieza| a {m} por unidad| a razón de {m}|\
 a un precio de {m}| al precio de {m}|, precio {m}|, precio: {m}|, precio unitario {m}|, precio unitario: {m}|\
, precio de {m}|, con precio de {m}|, costo {m}|, costo unitario {m}|, con un costo de {m}|, valor {m}|\
, valor unitario {m}| por {m}| por {m} cada uno| por {m} la unidad| en {m}| en {m} cada uno| @ {m}| de {m}|\
 de {m} cada uno| / {m}| - {m}|, a {m}|, pagando {m} por cada uno|, nos los dejaron en {m}|, tarifa {m}|\
 que cuestan {m}| que valen {m} cada uno|, cada uno sale en {m}|, me dijeron {m}|, según catálogo {m}""".split("|")

UNIT = {
    "unit": "unidades|uds|uds.|unid.|unidad|u.|piezas|pzas|pzas.|pza|pz|ejemplares",
    "box": "cajas|cajitas|cjs|caja|cartones|cajas grandes",
    "kg": "kilos|kg|kilogramos|kgs|kilo|Kg",
    "l": "litros|lts|l|litro|lt",
    "m": "metros|m|mts|metro",
    "bag": "bolsas|sacos|costales|bolsitas|bolsa",
    "bottle": "botellas|frascos|botes|botella",
    "roll": "rollos|bobinas|rollo",
    "pack": "paquetes|paq.|paquete|packs|lotes",
    "pallet": "palés|tarimas|palets",
}

MONEY = {
    "MXN": "{n} pesos|{n} pesos|{n} pesos mexicanos|{n} MXN|MXN {n}|${n}|$ {n}|{n} mxn|{n} varos|$ {n} pesos|{n}$",
    "USD": "{n} dólares|{n} dólares|{n} USD|USD {n}|US${n}|{n} dls|{n} usd|{n} dólares americanos|U$S {n}",
    "EUR": "{n} euros|{n} euros|{n} €|{n}€|€{n}|EUR {n}|{n} EUR|{n} eur",
    "GBP": "{n} libras|£{n}|{n} GBP|GBP {n}|{n} libras esterlinas",
    "PEN": "{n} soles|S/{n}|S/ {n}|{n} PEN|PEN {n}|{n} soles peruanos",
}

JOINER = """\
, | y |; |, y | y también |, además | más | junto con | así como |, luego |; también | + |, aparte |\
 y por último |, asimismo """.split("|")

DUE = """\
 para {day}| para {day}|, para {day}|, entrega {day}|, entregar {day}|. Entrega: {day}|. Lo necesito para {day}|\
, lo necesito {day}| a más tardar {day}|, a más tardar {day}|, antes de {day}| con entrega {day}|\
, que llegue {day}|, que lleguen {day}| y que llegue {day}|, lo recojo {day}|. Pasamos {day} por todo|\
, fecha límite {day}|, es para {day}|. Urge para {day}|, si puede ser {day}|, lo esperamos {day}|\
. Nos vemos {day}|; fecha: {day}""".split("|")

FRONT = """\
para {day} |Para {day}, |con entrega {day}, |antes de {day} |a más tardar {day} |{day} sin falta |\
urge para {day}: |que llegue {day}: |como fecha {day}, |entrega {day}; """.split("|")

DAY = {
    "monday": "el lunes|lunes|este lunes|el próximo lunes",
    "tuesday": "el martes|martes|este martes|el próximo martes",
    "wednesday": "el miércoles|miércoles|este miércoles|el próximo miércoles",
    "thursday": "el jueves|jueves|este jueves|el próximo jueves",
    "friday": "el viernes|viernes|este viernes|el próximo viernes",
    "saturday": "el sábado|sábado|este sábado|el próximo sábado",
    "sunday": "el domingo|domingo|este domingo|el próximo domingo",
    "today": "hoy|hoy mismo|hoy en la tarde",
    "tomorrow": "mañana|mañana temprano|mañana mismo",
}

NOTE = """\
como cada mes, |igual que la vez pasada, |mi número de cliente es {id}, |pedido {id}, |\
según la cotización {id}, |de la orden {id}, |para la sucursal {id}, |folio {id}: |aprovechando la oferta, |\
por encargo de {person}, |de parte de {person}, |ya pagué la factura {id}, |somos nuevos clientes, |sin prisa, |\
como acordamos, |tras hablar con {person}, |se nos acabó todo, |antes que nada gracias, |\
con factura por favor, |para el local de {person}, """.split("|")

CLOSE = """\
. Gracias|, gracias|. Muchas gracias|, por favor|. Por favor|. Saludos|. Saludos, {person}|. Un saludo|\
. Un abrazo|. Quedo atento|. Quedo al pendiente|. Espero respuesta|. Gracias de antemano|, gracias de antemano|\
. Atentamente, {person}|. Att. {person}|, porfa|, porfis|. Hasta luego|. Que tengan buen día|. Buen día|\
. Me confirman|. ¿Me confirmas?|, ¿se puede?|. Es urgente|. Con factura|. Pago de contado|. Pago con tarjeta|\
. Sin prisa|. Lo de siempre|. Mil gracias|. Mi teléfono es {id}|. Cliente {id}|. {person}""".split("|")

SEPARATOR = [", ", ", ", ". ", "! ", ": ", " ", "; ", " - "]

# A quantity in a phrase: text, value, what links it to a noun.
PHRASES = [
    ("una docena", 12, " de"), ("media docena", 6, " de"), ("dos docenas", 24, " de"), ("tres docenas", 36, " de"),
    ("un par", 2, " de"), ("un centenar", 100, " de"), ("medio centenar", 50, " de"), ("un millar", 1000, " de"),
    ("medio millar", 500, " de"), ("una decena", 10, " de"), ("mil", 1000, ""), ("cien", 100, ""), ("dos mil", 2000, ""),
    ("cinco mil", 5000, ""), ("diez mil", 10000, ""), ("una gruesa", 144, " de"), ("una veintena", 20, " de"),
    ("cuatro docenas", 48, " de"), ("mil quinientos", 1500, ""), ("un cuarto de millar", 250, " de"),
]  # fmt: skip
OF = ["de", "de", "de", "del", "de la", "con"]
